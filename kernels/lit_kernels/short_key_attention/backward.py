"""Triton: dQ, dK and dV of softmax attention to up to 128 keys, from Q, K, V and dO alone.

    P = softmax(Q Kᵀ · scale + mask),  dP = dO Vᵀ,  delta = rowsum(P ∘ dP),  dS = P ∘ (dP - delta) · scale,
    dQ = dS K,  dK = dSᵀ Q,  dV = Pᵀ dO

(FlashAttention's backward pass: Dao et al., 2022, arXiv 2205.14135; here without O or statistics of the rows). A
program owns all keys of one head and walks over a range of queries; dQ is complete, dK and dV are sums over the range,
which leave in fp32 and are added afterwards: no atomics, hence the same bits in every run. There are as many ranges as
fill the machine, also for one sample.

Where one program cannot hold all sums without spilling registers, a launch computes only some of them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lit_kernels import dispatch
from lit_kernels.compiling import Shipped
from lit_kernels.short_key_attention.forward import (
    BLOCKS,
    Config,
    blocks_of,
    form,
    mask_or_nothing,
    sizes_of,
    strides_of,
)
from lit_kernels.short_key_attention.function import MAX_KEYS, accumulator, key_of
from lit_kernels.tiles import accumulator as sums_in

PROGRAMS = (132, 264, 528)
"""Programs that are wanted at least: one for each multiprocessor of an H100, unless a table says more for this GPU.

This is what stands for a tile here: more ranges even out the last wave of programs, and leave more sums to add. The
number is the same for a GPU of one name, and so are sums."""
TILE = 32
LAUNCHES = {
    BLOCKS[48]: (("qkv", Config(TILE)),),
    BLOCKS[64]: (("qkv", Config(TILE)),),
    BLOCKS[80]: (("q", Config(TILE)), ("kv", Config(TILE))),
    BLOCKS[160]: (("q", Config(TILE)), ("k", Config(TILE // 2)), ("v", Config(TILE))),
}
"""What is launched for a head's two blocks: whose gradients, and how. Larger tiles spill on sm_80."""


@triton.jit(do_not_specialize=["eighths", "masked", "tiles"])
def short_key_backward(
    q, k, v, mask, grad, dq, partial,
    queries, keys, heads, eighths, q_batch, q_row, k_batch, k_row, v_batch, v_row, grad_batch, grad_row, masked, tiles,
    KEYS: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    DQ: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // heads).to(tl.int64)
    width = eighths * 8
    head = tl.program_id(1) % heads * width
    at = tl.arange(0, KEYS)
    wide = tl.arange(0, WIDE)[None, :]
    rest = WIDE + tl.arange(0, REST if REST > 0 else 16)[None, :]
    in_keys = (at < keys)[:, None]
    in_wide = wide < width
    in_rest = rest < width
    cd = q.dtype.element_ty
    k_at = k + batch * k_batch + at.to(tl.int64)[:, None] * k_row + head
    v_at = v + batch * v_batch + at.to(tl.int64)[:, None] * v_row + head
    k_wide = tl.load(k_at + wide, mask=in_keys & in_wide, other=0.0)
    v_wide = tl.load(v_at + wide, mask=in_keys & in_wide, other=0.0)
    dk_wide = tl.zeros((KEYS, WIDE), ACC)
    dv_wide = tl.zeros((KEYS, WIDE), ACC)
    if REST > 0:
        k_rest = tl.load(k_at + rest, mask=in_keys & in_rest, other=0.0)
        v_rest = tl.load(v_at + rest, mask=in_keys & in_rest, other=0.0)
        dk_rest = tl.zeros((KEYS, REST), ACC)
        dv_rest = tl.zeros((KEYS, REST), ACC)
    added = tl.load(mask + batch * keys + at, mask=at < masked, other=0.0).to(ACC)
    added = tl.where(at < keys, added, float("-inf"))[:, None]
    scale = 1.0 / tl.sqrt(width.to(ACC))
    begin = tl.program_id(0) * tiles * BM
    for start in range(begin, min(begin + tiles * BM, queries), BM):
        rows = start + tl.arange(0, BM)
        in_rows = (rows < queries)[:, None]
        q_at = q + batch * q_batch + rows.to(tl.int64)[:, None] * q_row + head
        grad_at = grad + batch * grad_batch + rows.to(tl.int64)[:, None] * grad_row + head
        q_wide = tl.load(q_at + wide, mask=in_rows & in_wide, other=0.0)
        grad_wide = tl.load(grad_at + wide, mask=in_rows & in_wide, other=0.0)
        scores = tl.dot(k_wide, tl.trans(q_wide), input_precision="ieee", out_dtype=ACC)
        if REST > 0:
            q_rest = tl.load(q_at + rest, mask=in_rows & in_rest, other=0.0)
            grad_rest = tl.load(grad_at + rest, mask=in_rows & in_rest, other=0.0)
            scores = tl.dot(k_rest, tl.trans(q_rest), scores, input_precision="ieee", out_dtype=ACC)
        scores = scores * scale + added
        top = tl.max(scores, 0, keep_dims=True)
        weights = tl.exp(scores - tl.where(top == float("-inf"), 0.0, top))
        total = tl.sum(weights, 0, keep_dims=True)
        p = weights / tl.where(total == 0, 1.0, total)
        if DV:
            dv_wide = tl.dot(p.to(cd), grad_wide, dv_wide, input_precision="ieee", out_dtype=ACC)
            if REST > 0:
                dv_rest = tl.dot(p.to(cd), grad_rest, dv_rest, input_precision="ieee", out_dtype=ACC)
        if DQ or DK:
            dp = tl.dot(v_wide, tl.trans(grad_wide), input_precision="ieee", out_dtype=ACC)
            if REST > 0:
                dp = tl.dot(v_rest, tl.trans(grad_rest), dp, input_precision="ieee", out_dtype=ACC)
            ds = (p * (dp - tl.sum(p * dp, 0, keep_dims=True)) * scale).to(cd)
        if DK:
            dk_wide = tl.dot(ds, q_wide, dk_wide, input_precision="ieee", out_dtype=ACC)
            if REST > 0:
                dk_rest = tl.dot(ds, q_rest, dk_rest, input_precision="ieee", out_dtype=ACC)
        if DQ:
            dq_at = dq + (batch * queries + rows)[:, None] * (heads * width) + head
            dq_wide = tl.dot(tl.trans(ds), k_wide, input_precision="ieee", out_dtype=ACC)
            tl.store(dq_at + wide, dq_wide.to(cd), mask=in_rows & in_wide)
            if REST > 0:
                dq_rest = tl.dot(tl.trans(ds), k_rest, input_precision="ieee", out_dtype=ACC)
                tl.store(dq_at + rest, dq_rest.to(cd), mask=in_rows & in_rest)
    batches = (tl.num_programs(1) // heads).to(tl.int64)
    dk_row = 2 * tl.program_id(0) * batches + batch
    dk_at = partial + (dk_row * keys + at)[:, None] * (heads * width) + head
    dv_at = dk_at + batches * keys * heads * width
    if DK:
        tl.store(dk_at + wide, dk_wide, mask=in_keys & in_wide)
        if REST > 0:
            tl.store(dk_at + rest, dk_rest, mask=in_keys & in_rest)
    if DV:
        tl.store(dv_at + wide, dv_wide, mask=in_keys & in_wide)
        if REST > 0:
            tl.store(dv_at + rest, dv_rest, mask=in_keys & in_rest)


def range_of(queries: int, heads: int, programs: int) -> int:
    """How many queries one program walks over, a multiple of `TILE`; `heads` counts those of all samples."""
    tiles = triton.cdiv(queries, TILE)
    return TILE * triton.cdiv(tiles, min(tiles, triton.cdiv(programs, heads)))


def launch(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, heads: int
) -> tuple[Tensor, Tensor]:
    """dQ `[B, T, C]`, and dK and dV together, `[2, B, S, C]`; all contiguous, in the queries' dtype."""
    batch, queries, columns = query.shape
    d_query = query.new_empty((batch, queries, columns))
    blocks = blocks_of(columns // heads)
    added, masked = mask_or_nothing(mask, query)
    programs = dispatch.tile(key_of(query, heads), "backward", query.device, PROGRAMS)
    length = range_of(queries, batch * heads, programs)
    ranges = triton.cdiv(queries, length)
    partial = query.new_empty((ranges, 2, batch, key.shape[1], columns), dtype=accumulator(query.dtype))
    for parts, config in LAUNCHES[blocks]:
        short_key_backward[(ranges, batch * heads)](
            query, key, value, added, grad, d_query, partial,
            *sizes_of(query, key, heads), *strides_of(query, key, value, grad), masked, length // config.rows,
            KEYS=MAX_KEYS, WIDE=blocks[0], REST=blocks[1], DQ="q" in parts, DK="k" in parts, DV="v" in parts,
            BM=config.rows, ACC=sums_in(query.dtype), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return d_query, partial.sum(0).to(query.dtype)


def shipped() -> list[Shipped]:
    """Every launch for heads up to 48, 64, 80 and 160 wide."""
    pointers = {"q": "*bf16", "k": "*bf16", "v": "*bf16", "mask": "*fp32", "grad": "*bf16", "dq": "*bf16"}
    pointers["partial"] = "*fp32"
    sizes = "queries keys heads eighths q_batch q_row k_batch k_row v_batch v_row grad_batch grad_row masked tiles"
    found = []
    for width, blocks in BLOCKS.items():
        for parts, config in LAUNCHES[blocks]:
            constants = {"WIDE": blocks[0], "REST": blocks[1], **{f"D{x.upper()}": x in parts for x in "qkv"}}
            label = f"{config.rows} queries, width {width}, {' '.join(f'd{x}' for x in parts)}"
            found.append(form(short_key_backward, label, pointers, sizes, constants, config))
    return found
