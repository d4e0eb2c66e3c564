"""Triton: y = x Wᵀ + bias + s_g · (x A_gᵀ) B_gᵀ in one launch; g is arithmetic on the row.

A program computes one tile of rows of one adapter by one tile of columns: tiles of rows begin anew with every adapter,
so nothing of another adapter is ever read. The same loop over K feeds both products; s·x·Aᵀ is rounded to x's dtype
between them, as if it were stored.

dX = dY W + dS A with dS = s · dY B has the same form, with W, A and B read the other way: the kernel is one.
Its tiles depend on the rows of one adapter, never on G: an adapter has the same bits in a bank and alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_kernels.compiling import Shipped
from lit_kernels.tiles import Config, accumulator, padded

MAX_RANK = 64
MAX_RANK_INSIDE = 16
"""Higher ranks have their side product computed before: inside, every tile of columns would compute it again."""


@triton.jit
def bank_lora_product(
    x, w, down, up, scale, bias, y, s,
    rows_each, row_tiles, column_tiles, depth, width, x_stride,
    FORWARD: tl.constexpr, BIASED: tl.constexpr, GIVEN: tl.constexpr, RANK: tl.constexpr, RANK_PAD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row_tile = tl.program_id(0) // column_tiles
    column_tile = tl.program_id(0) % column_tiles
    g = (row_tile // row_tiles).to(tl.int64)
    first = row_tile % row_tiles * BM
    row = g * rows_each + first  # offsets that may be long are scalars; those within a tile are short
    column = (column_tile * BN).to(tl.int64)
    ms = tl.arange(0, BM)
    ns = tl.arange(0, BN)
    ks = tl.arange(0, BK)
    ranks = tl.arange(0, RANK_PAD)
    in_rows = ms < rows_each - first
    in_columns = ns < width - column
    in_ranks = ranks < RANK
    cd = x.dtype.element_ty
    acc = tl.zeros((BM, BN), ACC)
    s_acc = tl.zeros((BM, RANK_PAD), ACC)
    s_at = s + row * RANK + ms[:, None] * RANK + ranks[None, :]
    x_at = x + row * x_stride
    x_in = ms[:, None] * x_stride + ks[None, :]
    if FORWARD:  # W [width, depth], A [G, R, depth], B [G, width, R]
        w_at = w + column * depth
        w_in = ns[None, :] * depth + ks[:, None]
        down_at = down + g * RANK * depth
        down_in = ranks[None, :] * depth + ks[:, None]
        up_at = up + (g * width + column) * RANK + ns[None, :] * RANK + ranks[:, None]
        w_step = BK
        down_step = BK
    else:  # W [depth, width], B [G, depth, R], A [G, R, width]
        w_at = w + column
        w_in = ks[:, None] * width + ns[None, :]
        down_at = down + g * depth * RANK
        down_in = ks[:, None] * RANK + ranks[None, :]
        up_at = up + g * RANK * width + column + ranks[:, None] * width + ns[None, :]
        w_step = BK * width
        down_step = BK * RANK
    for k in range(0, depth, BK):
        in_k = ks < depth - k
        x_tile = tl.load(x_at + x_in, mask=in_rows[:, None] & in_k[None, :], other=0.0)
        w_tile = tl.load(w_at + w_in, mask=in_k[:, None] & in_columns[None, :], other=0.0)
        acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee", out_dtype=ACC)
        x_at += BK
        w_at += w_step
        if not GIVEN:
            d_tile = tl.load(down_at + down_in, mask=in_k[:, None] & in_ranks[None, :], other=0.0)
            s_acc = tl.dot(x_tile, d_tile.to(cd), s_acc, input_precision="ieee", out_dtype=ACC)
            down_at += down_step
    if GIVEN:
        s_scaled = tl.load(s_at, mask=in_rows[:, None] & in_ranks[None, :], other=0.0)
    else:
        s_scaled = (s_acc * tl.load(scale + g).to(ACC)).to(cd)
        if column_tile == 0:  # all tiles of a row have the same s; the first one keeps it
            tl.store(s_at, s_scaled, mask=in_rows[:, None] & in_ranks[None, :])
    u_tile = tl.load(up_at, mask=in_ranks[:, None] & in_columns[None, :], other=0.0)
    acc = tl.dot(s_scaled, u_tile.to(cd), acc, input_precision="ieee", out_dtype=ACC)
    if BIASED:
        acc += tl.load(bias + column + ns, mask=in_columns, other=0.0).to(ACC)[None, :]
    y_at = y + row * width + column + ms[:, None] * width + ns[None, :]
    tl.store(y_at, acc.to(cd), mask=in_rows[:, None] & in_columns[None, :])


def config_for(dtype: torch.dtype) -> Config:
    """The tile: one for all sizes, 64 bytes deep."""
    return Config(128, 128, max(16, 64 // dtype.itemsize), 8, 4)


def launch_product(
    rows: Tensor, weight: Tensor, downs: Tensor, ups: Tensor, scales: Tensor, bias: Tensor | None,
    forward: bool, width: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`[M, width]` and the scaled side product `[M, R]`; a width of 0 computes the side product alone."""
    (m, depth), adapters, rank = rows.shape, len(downs), downs.shape[1 if forward else 2]
    config = config_for(rows.dtype)
    row_tiles, column_tiles = triton.cdiv(m // adapters, config.rows), max(1, triton.cdiv(width, config.columns))
    given = rank > MAX_RANK_INSIDE
    if given:
        side = (downs * scales[:, None, None]).to(rows.dtype)
        s = (rows.unflatten(0, (adapters, -1)) @ (side.mT if forward else side)).flatten(0, 1)
    else:
        s = rows.new_empty((m, rank))
    y = rows.new_empty((m, width))
    if given and not width:
        return y, s
    bank_lora_product[(adapters * row_tiles * column_tiles,)](
        rows, weight, downs, ups, scales, rows if bias is None else bias, y, s,
        m // adapters, row_tiles, column_tiles, depth, width, rows.stride(0),
        FORWARD=forward, BIASED=bias is not None, GIVEN=given, RANK=rank,
        RANK_PAD=padded(rank),
        BM=config.rows, BN=config.columns, BK=config.depth, ACC=accumulator(rows.dtype),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return y, s


def launch(
    x_MK: Tensor, weight_NK: Tensor, downs_GRK: Tensor, ups_GNR: Tensor, scales_G: Tensor, bias_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y `[M, N]` and S = s·x·Aᵀ `[M, R]`, both in x's dtype."""
    return launch_product(x_MK, weight_NK, downs_GRK, ups_GNR, scales_G, bias_N, True, len(weight_NK))


def shipped_products(forward: bool) -> list[Shipped]:
    """Ranks up to 16 and up to 64, in bf16 with factors in fp32."""
    pointers = {
        "x": "*bf16", "w": "*bf16", "down": "*fp32", "up": "*fp32", "scale": "*fp32", "bias": "*bf16", "y": "*bf16",
        "s": "*bf16",
    }  # fmt: skip
    sizes = dict.fromkeys(("rows_each", "row_tiles", "column_tiles", "depth", "width", "x_stride"), "i32")
    config = config_for(torch.bfloat16)
    found = []
    for rank in (8, MAX_RANK):
        constants = {
            "FORWARD": forward, "BIASED": forward, "GIVEN": rank > MAX_RANK_INSIDE, "RANK": rank,
            "RANK_PAD": max(16, rank), "BM": config.rows, "BN": config.columns, "BK": config.depth, "ACC": tl.float32,
        }  # fmt: skip
        label = f"{'y' if forward else 'dX'} {config.rows}x{config.columns}x{config.depth} rank {rank}"
        signature = {**pointers, **sizes, **dict.fromkeys(constants, "constexpr")}
        divisible = (*pointers, "depth", "width", "x_stride")
        found.append(Shipped(bank_lora_product, label, signature, constants, config.warps, config.stages, divisible))
    return found


def shipped() -> list[Shipped]:
    """The forms of y."""
    return shipped_products(forward=True)
