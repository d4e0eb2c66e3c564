"""Triton: dX and dS in one launch of the forward's kernel, then dA and dB as skinny sums over rows.

dA_g = dS_gᵀ X_g and dB_g = dY_gᵀ S_g have R rows or columns and a long sum: rows of an adapter are split into stretches
of `STRETCH`, each program writes its own sum in the accumulator's dtype, and they are summed in one order. No atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_kernels.bank_lora.forward import MAX_PARTS, launch_product, shipped_products, three
from lit_kernels.compiling import Shipped
from lit_kernels.tiles import Config, accumulator, one_of, padded

STRETCH = 512
"""Rows that one program sums; whatever M is, so that an adapter's sums do not depend on the others."""
SKINNY = Config(64, 64, 0, 4, 3)
"""Rows and columns of a tile; `depth` is not used."""


@triton.jit
def bank_lora_skinny(
    side, rows0, rows1, rows2, sums,
    adapters, rows_each, stretch_rows, stretches_each, width, rank_stride, column_stride,
    PARTS: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(2)
    rows_in = one_of(part, rows0, rows1, rows2, PARTS)
    stretch = tl.program_id(1).to(tl.int64)
    g = stretch // stretches_each
    begin = (stretch % stretches_each * stretch_rows).to(tl.int32)
    end = min(begin + stretch_rows, rows_each)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    in_columns = columns < width
    ranks = tl.arange(0, RANK_PAD)
    in_ranks = ranks < RANK
    side_at = side + part.to(tl.int64) * adapters * rows_each * RANK
    acc = tl.zeros((RANK_PAD, BN), ACC)
    for m in range(begin, end, BM):
        own = m + tl.arange(0, BM)
        in_rows = own < end
        rows = g * rows_each + own
        side_t = tl.load(
            side_at + rows[None, :] * RANK + ranks[:, None], mask=in_ranks[:, None] & in_rows[None, :], other=0.0
        )
        tile = tl.load(
            rows_in + rows[:, None] * width + columns[None, :],
            mask=in_rows[:, None] & in_columns[None, :],
            other=0.0,
        )
        acc = tl.dot(side_t, tile, acc, input_precision="ieee", out_dtype=ACC)
    at = sums + (part.to(tl.int64) * adapters * stretches_each + stretch) * RANK * width
    at = at + ranks.to(tl.int64)[:, None] * rank_stride + columns[None, :] * column_stride
    tl.store(at, acc, mask=in_ranks[:, None] & in_columns[None, :])


def launch_skinny(side_PMR: Tensor, rows: Sequence[Tensor], adapters: int, transposed: bool) -> Tensor:
    """sideᵀ rows of each part and adapter, `[P, G, R, C]`, or `[P, G, C, R]` if transposed; fp32, or fp64 for fp64.

    Args:
        side_PMR: S or dS of the parts.
        rows: `[.., C]` of each part, or one that all share.
    """
    (parts, m, rank), width = side_PMR.shape, rows[0].shape[-1]
    rows_each = m // adapters
    stretches = triton.cdiv(rows_each, STRETCH)
    shape = (width, rank) if transposed else (rank, width)
    dtype = torch.float64 if side_PMR.dtype == torch.float64 else torch.float32
    sums = side_PMR.new_empty((parts, adapters, stretches, *shape), dtype=dtype)
    bank_lora_skinny[(triton.cdiv(width, SKINNY.columns), adapters * stretches, parts)](
        side_PMR, *three(rows), sums,
        adapters, rows_each, STRETCH, stretches, width,
        1 if transposed else width, rank if transposed else 1,
        PARTS=len(rows), RANK=rank, RANK_PAD=padded(rank), BM=SKINNY.rows, BN=SKINNY.columns,
        ACC=accumulator(side_PMR.dtype), num_warps=SKINNY.warps, num_stages=SKINNY.stages,
    )  # fmt: skip
    return sums.squeeze(2) if stretches == 1 else sums.sum(dim=2)


def launch(
    grads: Sequence[Tensor], x: Tensor, s_PMR: Tensor, weights: Sequence[Tensor], downs: Sequence[Tensor],
    ups: Sequence[Tensor], scales_PG: Tensor, needs_x: bool, needs_down: bool, needs_up: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dX `[.., K]` in x's dtype, dA `[P, G, R, K]` and dB `[P, G, N, R]` in their own; empty where not needed."""
    dx, d_down, d_up = (like.new_empty(0) for like in (x, downs[0], ups[0]))
    adapters = scales_PG.shape[1]
    if needs_x or needs_down:
        width = x.shape[-1] if needs_x else 0
        (found,), ds = launch_product(grads, weights, ups, downs, scales_PG, None, False, width)
        if needs_x:
            dx = found
        if needs_down:
            d_down = launch_skinny(ds, [x], adapters, transposed=False).to(downs[0].dtype)
    if needs_up:
        d_up = launch_skinny(s_PMR, grads, adapters, transposed=True).to(ups[0].dtype)
    return dx, d_down, d_up


def shipped() -> list[Shipped]:
    """The forms of dX, and the skinny sums with ranks up to 16 and up to 64, of one part and of three."""
    found = shipped_products(forward=False)
    pointers = {"side": "*bf16", **{f"rows{part}": "*bf16" for part in range(MAX_PARTS)}, "sums": "*fp32"}
    sizes = dict.fromkeys(
        (
            "adapters", "rows_each", "stretch_rows", "stretches_each", "width", "rank_stride", "column_stride",
        ),
        "i32",
    )  # fmt: skip
    for parts, rank in ((1, 8), (1, 64), (MAX_PARTS, 8)):
        constants = {
            "PARTS": parts, "RANK": rank, "RANK_PAD": max(16, rank), "BM": SKINNY.rows, "BN": SKINNY.columns,
            "ACC": tl.float32,
        }  # fmt: skip
        signature = {**pointers, **sizes, **dict.fromkeys(constants, "constexpr")}
        label = f"dA, dB{f' of {parts}' if parts > 1 else ''} {SKINNY.rows}x{SKINNY.columns} rank {rank}"
        divisible = (*pointers, "stretch_rows", "width")
        found.append(Shipped(bank_lora_skinny, label, signature, constants, SKINNY.warps, SKINNY.stages, divisible))
    return found
