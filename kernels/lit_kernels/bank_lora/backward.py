"""Triton: dX and dS in one launch of the forward's kernel, then dA and dB as skinny sums over rows.

dA_g = dS_gᵀ X_g and dB_g = dY_gᵀ S_g have R rows or columns and a long sum: rows of an adapter are split into parts of
`PART`, each program writes its part in the accumulator's dtype, and the parts are summed in one order. No atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_kernels.bank_lora.forward import launch_product, shipped_products
from lit_kernels.compiling import Shipped
from lit_kernels.tiles import Config, accumulator, padded

PART = 512
"""Rows that one program sums; whatever M is, so that an adapter's sums do not depend on the others."""
SKINNY = Config(64, 64, 0, 4, 3)
"""Rows and columns of a tile; `depth` is not used."""


@triton.jit
def bank_lora_skinny(
    side, rows_in, parts,
    rows_each, part_rows, parts_each, width, in_stride, rank_stride, column_stride,
    RANK: tl.constexpr, RANK_PAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1).to(tl.int64)
    g = part // parts_each
    begin = (part % parts_each * part_rows).to(tl.int32)
    end = min(begin + part_rows, rows_each)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    in_columns = columns < width
    ranks = tl.arange(0, RANK_PAD)
    in_ranks = ranks < RANK
    acc = tl.zeros((RANK_PAD, BN), ACC)
    for m in range(begin, end, BM):
        own = m + tl.arange(0, BM)
        in_rows = own < end
        rows = g * rows_each + own
        side_t = tl.load(
            side + rows[None, :] * RANK + ranks[:, None], mask=in_ranks[:, None] & in_rows[None, :], other=0.0
        )
        tile = tl.load(
            rows_in + rows[:, None] * in_stride + columns[None, :],
            mask=in_rows[:, None] & in_columns[None, :],
            other=0.0,
        )
        acc = tl.dot(side_t, tile, acc, input_precision="ieee", out_dtype=ACC)
    at = parts + part * RANK * width + ranks.to(tl.int64)[:, None] * rank_stride + columns[None, :] * column_stride
    tl.store(at, acc, mask=in_ranks[:, None] & in_columns[None, :])


def launch_skinny(side_MR: Tensor, rows_MC: Tensor, adapters: int, transposed: bool) -> Tensor:
    """sideᵀ rows of each adapter, `[G, R, C]`, or `[G, C, R]` if transposed; fp32, or fp64 for fp64."""
    (m, rank), width = side_MR.shape, rows_MC.shape[1]
    rows_each = m // adapters
    parts_each = triton.cdiv(rows_each, PART)
    shape = (width, rank) if transposed else (rank, width)
    dtype = torch.float64 if rows_MC.dtype == torch.float64 else torch.float32
    parts = rows_MC.new_empty((adapters, parts_each, *shape), dtype=dtype)
    bank_lora_skinny[(triton.cdiv(width, SKINNY.columns), adapters * parts_each)](
        side_MR, rows_MC, parts,
        rows_each, PART, parts_each, width, rows_MC.stride(0), 1 if transposed else width, rank if transposed else 1,
        RANK=rank, RANK_PAD=padded(rank), BM=SKINNY.rows, BN=SKINNY.columns,
        ACC=accumulator(rows_MC.dtype), num_warps=SKINNY.warps, num_stages=SKINNY.stages,
    )  # fmt: skip
    return parts.squeeze(1) if parts_each == 1 else parts.sum(dim=1)


def launch(
    grad_MN: Tensor, x_MK: Tensor, s_MR: Tensor, weight_NK: Tensor, downs_GRK: Tensor, ups_GNR: Tensor,
    scales_G: Tensor, needs_x: bool, needs_down: bool, needs_up: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dX `[M, K]` in x's dtype, dA and dB in their own; empty where not needed."""
    dx, d_down, d_up = (like.new_empty(0) for like in (x_MK, downs_GRK, ups_GNR))
    if needs_x or needs_down:
        width = x_MK.shape[1] if needs_x else 0
        found, ds = launch_product(grad_MN, weight_NK, ups_GNR, downs_GRK, scales_G, None, False, width)
        if needs_x:
            dx = found
        if needs_down:
            d_down = launch_skinny(ds, x_MK, len(downs_GRK), transposed=False).to(downs_GRK.dtype)
    if needs_up:
        d_up = launch_skinny(s_MR, grad_MN, len(ups_GNR), transposed=True).to(ups_GNR.dtype)
    return dx, d_down, d_up


def shipped() -> list[Shipped]:
    """The forms of dX, and the skinny sums with ranks up to 16 and up to 64."""
    found = shipped_products(forward=False)
    pointers = {"side": "*bf16", "rows_in": "*bf16", "parts": "*fp32"}
    sizes = dict.fromkeys(
        ("rows_each", "part_rows", "parts_each", "width", "in_stride", "rank_stride", "column_stride"), "i32"
    )
    for rank in (8, 64):
        constants = {
            "RANK": rank, "RANK_PAD": max(16, rank), "BM": SKINNY.rows, "BN": SKINNY.columns, "ACC": tl.float32
        }  # fmt: skip
        signature = {**pointers, **sizes, **dict.fromkeys(constants, "constexpr")}
        label = f"dA, dB {SKINNY.rows}x{SKINNY.columns} rank {rank}"
        divisible = (*pointers, "part_rows", "width", "in_stride")
        found.append(Shipped(bank_lora_skinny, label, signature, constants, SKINNY.warps, SKINNY.stages, divisible))
    return found
