"""Triton: y = x Wᵀ + s · (x Aᵀ) Bᵀ for all slices in one launch.

A program computes one tile of rows by one tile of columns. Tiles of columns never cross from one slice to the next:
`tiles` says to which slice a tile belongs and where it begins and ends. The same loop over D feeds both products, so
that the text is read once; s·x·Aᵀ is rounded to the text's dtype between them, as if it were stored.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_kernels import dispatch
from lit_kernels.compiling import Shipped
from lit_kernels.text_kv.function import key_of
from lit_kernels.tiles import Config, accumulator, padded


@triton.jit
def text_kv_forward(
    x, w, down, up, scale, tiles, y, s,
    m_rows, depth, x_stride, y_stride, slices,
    RANK: tl.constexpr, RANK_PAD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    g = tl.load(tiles + 4 * tile)
    begin = tl.load(tiles + 4 * tile + 1)
    end = tl.load(tiles + 4 * tile + 2)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    columns = begin + tl.arange(0, BN)
    ranks = tl.arange(0, RANK_PAD)
    ks = tl.arange(0, BK)
    in_rows = rows < m_rows
    in_columns = columns < end
    in_ranks = ranks < RANK
    cd = x.dtype.element_ty
    acc = tl.zeros((BM, BN), ACC)
    s_acc = tl.zeros((BM, RANK_PAD), ACC)
    x_at = x + rows.to(tl.int64)[:, None] * x_stride
    w_at = w + columns.to(tl.int64)[None, :] * depth
    a_at = down + (g.to(tl.int64) * RANK + ranks)[None, :] * depth
    for k in range(0, depth, BK):
        in_k = k + ks < depth
        x_tile = tl.load(x_at + (k + ks)[None, :], mask=in_rows[:, None] & in_k[None, :], other=0.0)
        w_tile = tl.load(w_at + (k + ks)[:, None], mask=in_k[:, None] & in_columns[None, :], other=0.0)
        a_tile = tl.load(a_at + (k + ks)[:, None], mask=in_k[:, None] & in_ranks[None, :], other=0.0)
        acc = tl.dot(x_tile, w_tile.to(cd), acc, input_precision="ieee", out_dtype=ACC)
        s_acc = tl.dot(x_tile, a_tile.to(cd), s_acc, input_precision="ieee", out_dtype=ACC)
    s_scaled = (s_acc * tl.load(scale + g).to(ACC)).to(cd)
    b_tile = tl.load(
        up + columns.to(tl.int64)[None, :] * RANK + ranks[:, None],
        mask=in_ranks[:, None] & in_columns[None, :],
        other=0.0,
    )
    acc = tl.dot(s_scaled, b_tile.to(cd), acc, input_precision="ieee", out_dtype=ACC)
    y_at = y + rows.to(tl.int64)[:, None] * y_stride + columns[None, :]
    tl.store(y_at, acc.to(cd), mask=in_rows[:, None] & in_columns[None, :])
    if tl.load(tiles + 4 * tile + 3) == 1:  # all tiles of a slice have the same s; the first one keeps it
        s_at = s + (rows.to(tl.int64)[:, None] * slices + g) * RANK + ranks[None, :]
        tl.store(s_at, s_scaled, mask=in_rows[:, None] & in_ranks[None, :])


def config_for(rows: int, rank: int, dtype: torch.dtype = torch.bfloat16) -> Config:
    """The tile for M rows; 77 of one sample make two tiles of 64, 154 three. A tile is 128 bytes deep."""
    depth = max(16, 128 // dtype.itemsize)
    if rows <= 32:
        return Config(32, 64, depth, 4, 3)
    if rows <= 512:
        return Config(64, 64, depth, 4, 3)
    return Config(128, 128 if rank <= 16 else 64, depth, 8, 3)  # 128x128 spills at rank 64


MORE = (Config(128, 64, 64, 8, 3), Config(64, 128, 64, 4, 3))
"""For ranks up to 16: the 77 rows of one sample in one tile, so that W is read once, and wider tiles of columns."""


def tiles_for(rows: int, rank: int, dtype: torch.dtype = torch.bfloat16) -> list[Config]:
    """All tiles that M rows may take, the default first."""
    found = [config_for(rows, rank, dtype)]
    if dtype.itemsize == 2:
        found += [config_for(size, rank, dtype) for size in DEFAULTS_FOR] + list(MORE if rank <= 16 else ())
    return list(dict.fromkeys(found))


DEFAULTS_FOR = (1, 77, 1024)
"""Rows for which the defaults differ."""


@functools.lru_cache(maxsize=64)
def tiles_of(widths: tuple[int, ...], columns: int, device: torch.device) -> Tensor:
    """int32 `[T, 4]` for every tile of columns: its slice, first column, end of the slice, whether it is its first."""
    rows, begin = [], 0
    for g, width in enumerate(widths):
        rows += [(g, begin + at, begin + width, int(at == 0)) for at in range(0, width, columns)]
        begin += width
    return torch.tensor(rows, dtype=torch.int32, device=device)


def launch(
    text_MD: Tensor, weight_ND: Tensor, down_GRD: Tensor, up_NR: Tensor, scale_G: Tensor, widths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """y `[M, N]` and s·x·Aᵀ `[M, G, R]`, both in the text's dtype."""
    (m, depth), (slices, rank, _) = text_MD.shape, down_GRD.shape
    key = key_of(text_MD.dtype, rank, m, len(weight_ND))
    config = dispatch.tile(key, "forward", text_MD.device, tiles_for(m, rank, text_MD.dtype))
    tiles = tiles_of(tuple(widths), config.columns, text_MD.device)
    y = text_MD.new_empty((m, len(weight_ND)))
    s = text_MD.new_empty((m, slices, rank))
    text_kv_forward[(len(tiles), triton.cdiv(m, config.rows))](
        text_MD, weight_ND, down_GRD, up_NR, scale_G, tiles, y, s,
        m, depth, text_MD.stride(0), y.stride(0), slices,
        RANK=rank, RANK_PAD=padded(rank),
        BM=config.rows, BN=config.columns, BK=config.depth, ACC=accumulator(text_MD.dtype),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return y, s


def shipped() -> list[Shipped]:
    """Each tile with ranks up to 16, and the defaults with ranks up to 64, in bf16 with factors in fp32."""
    pointers = {"x": "*bf16", "w": "*bf16", "down": "*fp32", "up": "*fp32", "scale": "*fp32", "tiles": "*i32"}
    sizes = dict.fromkeys(("m_rows", "depth", "x_stride", "y_stride", "slices"), "i32")
    found = []
    for rank in (8, 64):
        for config in tiles_for(1, rank):
            constants = {
                "RANK": rank, "RANK_PAD": max(16, rank), "BM": config.rows, "BN": config.columns, "BK": config.depth,
                "ACC": tl.float32,
            }  # fmt: skip
            signature = {**pointers, "y": "*bf16", "s": "*bf16", **sizes, **dict.fromkeys(constants, "constexpr")}
            label = f"{config.rows}x{config.columns}x{config.depth} rank {rank}"
            divisible = (*pointers, "y", "s", "depth", "x_stride", "y_stride")
            found.append(
                Shipped(text_kv_forward, label, signature, constants, config.warps, config.stages, divisible)
            )
    return found
