"""Triton: y = x Wᵀ + bias + s_g · (x A_gᵀ) B_gᵀ in one launch; g is arithmetic on the row.

Up to three layers of one x (q, k and v of an attention layer) are parts of one launch, each with its own W, A, B and y.

A program computes one tile of rows of one adapter by one tile of columns of one part: tiles of rows begin anew with
every adapter, so nothing of another adapter is ever read. The same loop over K feeds both products; s·x·Aᵀ is rounded
to x's dtype between them, as if it were stored.

dX = dY W + dS A with dS = s · dY B has the same form, with W, A and B read the other way: the kernel is one. There the
parts are summed in the tile, one after the other, so that dX is written once.
Its tiles depend on the rows of one adapter, never on G: an adapter has the same bits in a bank and alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_kernels import dispatch
from lit_kernels.bank_lora.function import key_of
from lit_kernels.compiling import Shipped
from lit_kernels.tiles import Config, accumulator, one_of, padded

MAX_RANK = 64
MAX_RANK_INSIDE = 16
"""Higher ranks have their side product computed before: inside, every tile of columns would compute it again."""
MAX_PARTS = 3
ENOUGH_PROGRAMS = 108
"""One for each multiprocessor of an A100; an H200 has 132."""


@triton.jit
def bank_lora_product(
    x0, x1, x2, w0, w1, w2, down0, down1, down2, up0, up1, up2, y0, y1, y2, scale, bias, s,
    adapters, rows_each, row_tiles, column_tiles, depth, width,
    FORWARD: tl.constexpr, PARTS: tl.constexpr, BIASED: tl.constexpr, GIVEN: tl.constexpr,
    RANK: tl.constexpr, RANK_PAD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    column_tile = tl.program_id(0) % column_tiles
    row_tile = tl.program_id(0) // column_tiles
    own = 0
    LOOPS: tl.constexpr = 1 if FORWARD else PARTS
    if FORWARD:
        own = row_tile % PARTS
        row_tile = row_tile // PARTS
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
    cd = x0.dtype.element_ty
    x_in = ms[:, None] * depth + ks[None, :]
    if FORWARD:  # W [width, depth], A [G, R, depth], B [G, width, R]
        w_begin = column * depth
        w_in = ns[None, :] * depth + ks[:, None]
        down_begin = g * RANK * depth
        down_in = ranks[None, :] * depth + ks[:, None]
        up_begin = (g * width + column) * RANK
        up_in = ns[None, :] * RANK + ranks[:, None]
        w_step = BK
        down_step = BK
    else:  # W [depth, width], B [G, depth, R], A [G, R, width]
        w_begin = column
        w_in = ks[:, None] * width + ns[None, :]
        down_begin = g * depth * RANK
        down_in = ks[:, None] * RANK + ranks[None, :]
        up_begin = g * RANK * width + column
        up_in = ranks[:, None] * width + ns[None, :]
        w_step = BK * width
        down_step = BK * RANK
    acc = tl.zeros((BM, BN), ACC)
    for loop in range(0, LOOPS):
        part = own + loop
        x_at = one_of(loop, x0, x1, x2, LOOPS) + row * depth
        w_at = one_of(part, w0, w1, w2, PARTS) + w_begin
        down_at = one_of(part, down0, down1, down2, PARTS) + down_begin
        s_at = s + (part * adapters * rows_each + row) * RANK + ms[:, None] * RANK + ranks[None, :]
        s_acc = tl.zeros((BM, RANK_PAD), ACC)
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
            s_scaled = (s_acc * tl.load(scale + part * adapters + g).to(ACC)).to(cd)
            if column_tile == 0:  # all tiles of a row have the same s; the first one keeps it
                tl.store(s_at, s_scaled, mask=in_rows[:, None] & in_ranks[None, :])
        up_at = one_of(part, up0, up1, up2, PARTS) + up_begin
        u_tile = tl.load(up_at + up_in, mask=in_ranks[:, None] & in_columns[None, :], other=0.0)
        acc = tl.dot(s_scaled, u_tile.to(cd), acc, input_precision="ieee", out_dtype=ACC)
    if BIASED:
        acc += tl.load(bias + column + ns, mask=in_columns, other=0.0).to(ACC)[None, :]
    y_at = one_of(own, y0, y1, y2, PARTS if FORWARD else 1) + row * width + column
    y_at = y_at + ms[:, None] * width + ns[None, :]
    tl.store(y_at, acc.to(cd), mask=in_rows[:, None] & in_columns[None, :])


def tiles_for(dtype: torch.dtype, rows_each: int, columns: int) -> tuple[Config, ...]:
    """The tiles, 64 bytes deep, the default first: the large one where it gives a GPU enough programs.

    How many adapters there are does not matter, so that each has the same bits in a bank and alone.
    """
    depth = max(16, 64 // dtype.itemsize)
    large, small = Config(128, 128, depth, 8, 4), Config(64, 64, depth, 4, 4)
    programs = triton.cdiv(rows_each, large.rows) * triton.cdiv(columns, large.columns)
    return (large, small) if programs >= ENOUGH_PROGRAMS else (small, large)


def launch_product(
    rows: Sequence[Tensor], weights: Sequence[Tensor], downs: Sequence[Tensor], ups: Sequence[Tensor],
    scales_PG: Tensor, bias: Tensor | None, forward: bool, width: int,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Results `[.., width]`, one for each part or for dX their sum, and the scaled side products `[P, M, R]`.

    All inputs are contiguous. A width of 0 computes the side products alone. Factors are `[G, ..]`, or without G where
    there is one adapter.
    """
    parts, adapters = scales_PG.shape
    (*leading, depth), rank = rows[0].shape, downs[0].shape[-2 if forward else -1]
    m = math.prod(leading)
    key = key_of(rows[0].dtype, m // adapters, weights[0], 1, rank)
    offered = tiles_for(rows[0].dtype, m // adapters, width * (parts if forward else 1))
    config = dispatch.tile(key, "forward" if forward else "backward", rows[0].device, offered)
    row_tiles, column_tiles = triton.cdiv(m // adapters, config.rows), max(1, triton.cdiv(width, config.columns))
    given = rank > MAX_RANK_INSIDE
    s = rows[0].new_empty((parts, m, rank))
    if given:
        for part in range(parts):
            factor = downs[part].reshape(adapters, *downs[part].shape[-2:])
            side = (factor * scales_PG[part, :, None, None]).to(s.dtype)
            x = rows[0 if forward else part].view(adapters, -1, depth)
            torch.matmul(x, side.mT if forward else side, out=s[part].unflatten(0, (adapters, -1)))
    ys = [rows[0].new_empty((*leading, width)) for _ in range(parts if forward else 1)]
    if given and not width:
        return ys, s
    bank_lora_product[(adapters * row_tiles * column_tiles * (parts if forward else 1),)](
        *three(rows), *three(weights), *three(downs), *three(ups), *three(ys),
        scales_PG, rows[0] if bias is None else bias, s,
        adapters, m // adapters, row_tiles, column_tiles, depth, width,
        FORWARD=forward, PARTS=parts, BIASED=bias is not None, GIVEN=given, RANK=rank, RANK_PAD=padded(rank),
        BM=config.rows, BN=config.columns, BK=config.depth, ACC=accumulator(rows[0].dtype),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return ys, s


def three(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """As many as a kernel has arguments: the first again for parts that are not there."""
    return [*tensors, *[tensors[0]] * (MAX_PARTS - len(tensors))]


def launch(
    x: Tensor, weights: Sequence[Tensor], downs: Sequence[Tensor], ups: Sequence[Tensor], scales_PG: Tensor,
    bias_N: Tensor | None,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """y `[.., N]` of each part and S = s·x·Aᵀ `[P, M, R]`, all in x's dtype."""
    return launch_product([x], weights, downs, ups, scales_PG, bias_N, True, len(weights[0]))


def shipped_products(forward: bool) -> list[Shipped]:
    """Ranks up to 16 and up to 64, one part and several, in bf16 with factors in fp32."""
    numbered = {"x": "*bf16", "w": "*bf16", "down": "*fp32", "up": "*fp32", "y": "*bf16"}
    pointers = {f"{name}{part}": kind for name, kind in numbered.items() for part in range(MAX_PARTS)}
    pointers |= {"scale": "*fp32", "bias": "*bf16", "s": "*bf16"}
    sizes = dict.fromkeys(("adapters", "rows_each", "row_tiles", "column_tiles", "depth", "width"), "i32")
    tiles = tiles_for(torch.bfloat16, 1 << 20, 1 << 20)
    found = []  # two parts are three with one choice less
    for config, parts, rank in itertools.product(tiles, (1, MAX_PARTS), (8, MAX_RANK)):
        constants = {
            "FORWARD": forward, "PARTS": parts, "BIASED": forward and parts == 1, "GIVEN": rank > MAX_RANK_INSIDE,
            "RANK": rank, "RANK_PAD": max(16, rank), "BM": config.rows, "BN": config.columns, "BK": config.depth,
            "ACC": tl.float32,
        }  # fmt: skip
        of = f" of {parts}" if parts > 1 else ""
        label = f"{'y' if forward else 'dX'}{of} {config.rows}x{config.columns}x{config.depth} rank {rank}"
        signature = {**pointers, **sizes, **dict.fromkeys(constants, "constexpr")}
        divisible = (*pointers, "depth", "width")
        found.append(Shipped(bank_lora_product, label, signature, constants, config.warps, config.stages, divisible))
    return found


def shipped() -> list[Shipped]:
    """The forms of y."""
    return shipped_products(forward=True)
