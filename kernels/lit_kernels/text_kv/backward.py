"""Triton: dB and dS of all slices in one launch, of y = x Wᵀ + S Bᵀ with S = s · x Aᵀ.

dB = dYᵀ S is a sum over rows, dS = s · dY B a sum over the columns of a slice. Both read dY, but their sums cross, so a
program does one or the other: no atomics, hence the same bits in every run. What is left are plain matrix products
(`function.py`): dA = dSᵀ x, and on request dW = dYᵀ x and dx = dY W + dS A.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_kernels import dispatch
from lit_kernels.compiling import Shipped
from lit_kernels.text_kv.forward import tiles_of
from lit_kernels.text_kv.function import key_of
from lit_kernels.tiles import Config, accumulator, padded

CONFIG = Config(32, 64, 64, 4, 2)
"""Rows and columns of a tile of dY; `depth` is not used."""
MORE = (Config(64, 64, 64, 4, 2), Config(64, 128, 64, 8, 2))
"""For ranks up to 16, where every token learns: fewer steps of the sum over rows of a large batch."""


def tiles_for(rank: int, period: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Config, ...]:
    """All tiles that may be taken, the default first."""
    return (CONFIG, *MORE) if rank <= 16 and not period and dtype.itemsize == 2 else (CONFIG,)


@triton.jit
def text_kv_backward(
    dy, s, up, scale, tiles, bounds, dup, ds,
    m_rows, dy_stride, slices, column_tiles, row_tiles,
    RANK: tl.constexpr, RANK_PAD: tl.constexpr, PERIOD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    ranks = tl.arange(0, RANK_PAD)
    in_ranks = ranks < RANK
    cd = dy.dtype.element_ty
    if program < column_tiles:
        g = tl.load(tiles + 4 * program)
        columns = tl.load(tiles + 4 * program + 1) + tl.arange(0, BN)
        in_columns = columns < tl.load(tiles + 4 * program + 2)
        up_acc = tl.zeros((BN, RANK_PAD), ACC)
        for m in range(0, m_rows, BM):
            rows = m + tl.arange(0, BM)
            learns = rows < m_rows
            if PERIOD > 0:
                learns = learns & (rows % PERIOD != 0)
            at = rows.to(tl.int64)
            dy_t = tl.load(
                dy + at[None, :] * dy_stride + columns[:, None], mask=in_columns[:, None] & learns[None, :], other=0.0
            )
            s_tile = tl.load(
                s + (at[:, None] * slices + g) * RANK + ranks[None, :],
                mask=learns[:, None] & in_ranks[None, :],
                other=0.0,
            )
            up_acc = tl.dot(dy_t, s_tile, up_acc, input_precision="ieee", out_dtype=ACC)
        dup_at = dup + columns.to(tl.int64)[:, None] * RANK + ranks[None, :]
        tl.store(dup_at, up_acc.to(dup.dtype.element_ty), mask=in_columns[:, None] & in_ranks[None, :])
    else:
        g = (program - column_tiles) // row_tiles
        rows = (program - column_tiles) % row_tiles * BM + tl.arange(0, BM)
        in_rows = rows < m_rows
        learns = in_rows
        if PERIOD > 0:
            learns = learns & (rows % PERIOD != 0)
        at = rows.to(tl.int64)
        begin = tl.load(bounds + g)
        end = tl.load(bounds + g + 1)
        s_acc = tl.zeros((BM, RANK_PAD), ACC)
        for n in range(begin, end, BN):
            columns = n + tl.arange(0, BN)
            in_columns = columns < end
            dy_tile = tl.load(
                dy + at[:, None] * dy_stride + columns[None, :], mask=learns[:, None] & in_columns[None, :], other=0.0
            )
            b_tile = tl.load(
                up + columns.to(tl.int64)[:, None] * RANK + ranks[None, :],
                mask=in_columns[:, None] & in_ranks[None, :],
                other=0.0,
            )
            s_acc = tl.dot(dy_tile, b_tile.to(cd), s_acc, input_precision="ieee", out_dtype=ACC)
        s_acc = s_acc * tl.load(scale + g).to(ACC)
        ds_at = ds + (at[:, None] * slices + g) * RANK + ranks[None, :]
        tl.store(ds_at, s_acc.to(cd), mask=in_rows[:, None] & in_ranks[None, :])


@functools.lru_cache(maxsize=64)
def bounds_of(widths: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 `[G + 1]`: where slices begin and end."""
    return torch.tensor([0, *accumulate(widths)], dtype=torch.int32, device=device)


def launch(
    grad_MN: Tensor, s_MGR: Tensor, up_NR: Tensor, scale_G: Tensor, widths: Sequence[int], period: int
) -> tuple[Tensor, Tensor]:
    """dB `[N, R]` in B's dtype and dS `[M, G, R]` in the gradient's; rows m with m % period = 0 take no part."""
    m, slices, rank = s_MGR.shape
    key = key_of(grad_MN.dtype, rank, m, grad_MN.shape[1])
    config = dispatch.tile(key, "backward", grad_MN.device, tiles_for(rank, period, grad_MN.dtype))
    tiles, bounds = tiles_of(tuple(widths), config.columns, grad_MN.device), bounds_of(tuple(widths), grad_MN.device)
    row_tiles = triton.cdiv(m, config.rows)
    dup, ds = torch.empty_like(up_NR), torch.empty_like(s_MGR)
    text_kv_backward[(len(tiles) + slices * row_tiles,)](
        grad_MN, s_MGR, up_NR, scale_G, tiles, bounds, dup, ds,
        m, grad_MN.stride(0), slices, len(tiles), row_tiles,
        RANK=rank, RANK_PAD=padded(rank), PERIOD=period,
        BM=config.rows, BN=config.columns, ACC=accumulator(grad_MN.dtype),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return dup, ds


def shipped() -> list[Shipped]:
    """Ranks up to 16 and up to 64, with and without a first token that learns nothing."""
    pointers = {"dy": "*bf16", "s": "*bf16", "up": "*fp32", "scale": "*fp32", "tiles": "*i32", "bounds": "*i32"}
    sizes = dict.fromkeys(("m_rows", "dy_stride", "slices", "column_tiles", "row_tiles"), "i32")
    found = []
    forms = [(rank, period, config) for rank in (8, 64) for period in (0, 77) for config in tiles_for(rank, period)]
    for rank, period, config in forms:
        constants = {
            "RANK": rank, "RANK_PAD": max(16, rank), "PERIOD": period, "BM": config.rows, "BN": config.columns,
            "ACC": tl.float32,
        }  # fmt: skip
        signature = {**pointers, "dup": "*fp32", "ds": "*bf16", **sizes, **dict.fromkeys(constants, "constexpr")}
        label = f"{config.rows}x{config.columns} rank {rank}" + (" without first token" if period else "")
        divisible = (*pointers, "dup", "ds", "dy_stride")
        found.append(Shipped(text_kv_backward, label, signature, constants, config.warps, config.stages, divisible))
    return found
