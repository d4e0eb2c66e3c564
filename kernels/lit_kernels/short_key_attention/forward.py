"""Triton: softmax(Q Kᵀ / sqrt(H) + mask) V for up to 128 keys, and the mean of the probabilities over heads.

All keys of a head fit on the chip, so a softmax sees all of its scores at once: no running maximum, and nothing to save
but Q, K and V. Scores stand upright, keys by queries: a tile may have any number of queries (few take few registers),
and the mask is one number a row. Where all keys of a sample are masked, the largest score is -inf and the sum of the
weights 0: with 0 and 1 in their places the probabilities are zeros.

Tensors are `[B, T, C]` with the heads side by side, and only the last stride must be 1. Blocks are powers of two and
head widths 40, 80 and 160 are not: a head's columns are loaded in two blocks, `WIDE` and `REST`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lit_kernels import dispatch
from lit_kernels.compiling import Shipped
from lit_kernels.short_key_attention.function import MAX_KEYS, accumulator, key_of
from lit_kernels.tiles import accumulator as sums_in

BLOCKS = {48: (32, 16), 64: (64, 0), 80: (64, 16), 160: (128, 32)}
"""Columns of the two blocks, by the widest head that they take."""


@dataclass(frozen=True)
class Config:
    """One compiled form: queries of a tile, and how it is run."""

    rows: int
    warps: int = 8
    stages: int = 1

    def __str__(self) -> str:
        return f"{self.rows} queries, {self.warps} warps"


FORWARD = Config(64)
MORE: dict[tuple[int, int], tuple[Config, ...]] = {
    BLOCKS[48]: (Config(128),), BLOCKS[64]: (Config(128),), BLOCKS[160]: (Config(16, 4),)
}  # fmt: skip
"""Other tiles by a head's two blocks: larger ones for many queries, smaller ones for the few of the deepest layers."""
MAP = Config(64, stages=2)
MAP_COLUMNS = 16


@triton.jit(do_not_specialize=["eighths", "masked"])
def short_key_forward(
    q, k, v, mask, out,
    queries, keys, heads, eighths, q_batch, q_row, k_batch, k_row, v_batch, v_row, masked,
    KEYS: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, BM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // heads).to(tl.int64)
    width = eighths * 8  # loads of 8 columns are known to be aligned
    head = tl.program_id(1) % heads * width
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    at = tl.arange(0, KEYS)
    wide = tl.arange(0, WIDE)[None, :]
    in_rows = (rows < queries)[:, None]
    in_keys = (at < keys)[:, None]
    in_wide = wide < width
    q_at = q + batch * q_batch + rows.to(tl.int64)[:, None] * q_row + head
    k_at = k + batch * k_batch + at.to(tl.int64)[:, None] * k_row + head
    v_at = v + batch * v_batch + at.to(tl.int64)[:, None] * v_row + head
    out_at = out + (batch * queries + rows)[:, None] * (heads * width) + head
    cd = q.dtype.element_ty
    q_wide = tl.load(q_at + wide, mask=in_rows & in_wide, other=0.0)
    k_wide = tl.load(k_at + wide, mask=in_keys & in_wide, other=0.0)
    scores = tl.dot(k_wide, tl.trans(q_wide), input_precision="ieee", out_dtype=ACC)
    if REST > 0:
        rest = WIDE + tl.arange(0, REST)[None, :]
        in_rest = rest < width
        q_rest = tl.load(q_at + rest, mask=in_rows & in_rest, other=0.0)
        k_rest = tl.load(k_at + rest, mask=in_keys & in_rest, other=0.0)
        scores = tl.dot(k_rest, tl.trans(q_rest), scores, input_precision="ieee", out_dtype=ACC)
    added = tl.load(mask + batch * keys + at, mask=at < masked, other=0.0).to(ACC)  # without a mask none is read
    added = tl.where(at < keys, added, float("-inf"))[:, None]
    scores = scores / tl.sqrt(width.to(ACC)) + added
    top = tl.max(scores, 0, keep_dims=True)
    weights = tl.exp(scores - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, 0, keep_dims=True)
    p = tl.trans((weights / tl.where(total == 0, 1.0, total)).to(cd))
    v_wide = tl.load(v_at + wide, mask=in_keys & in_wide, other=0.0)
    out_wide = tl.dot(p, v_wide, input_precision="ieee", out_dtype=ACC)
    tl.store(out_at + wide, out_wide.to(cd), mask=in_rows & in_wide)
    if REST > 0:
        v_rest = tl.load(v_at + rest, mask=in_keys & in_rest, other=0.0)
        out_rest = tl.dot(p, v_rest, input_precision="ieee", out_dtype=ACC)
        tl.store(out_at + rest, out_rest.to(cd), mask=in_rows & in_rest)


@triton.jit(do_not_specialize=["eighths", "masked"])
def short_key_map(
    q, k, mask, out,
    queries, keys, heads, eighths, q_batch, q_row, k_batch, k_row, masked,
    KEYS: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    width = eighths * 8
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    at = tl.arange(0, KEYS)
    in_rows = (rows < queries)[:, None]
    in_keys = (at < keys)[:, None]
    q_at = q + batch * q_batch + rows.to(tl.int64)[:, None] * q_row
    k_at = k + batch * k_batch + at.to(tl.int64)[:, None] * k_row
    added = tl.load(mask + batch * keys + at, mask=at < masked, other=0.0).to(ACC)
    added = tl.where(at < keys, added, float("-inf"))[:, None]
    mean = tl.zeros((KEYS, BM), ACC)
    for head in range(heads):
        scores = tl.zeros((KEYS, BM), ACC)
        for begin in range(0, width, BK):
            columns = begin + tl.arange(0, BK)[None, :]
            in_columns = columns < width
            columns += head * width
            q_tile = tl.load(q_at + columns, mask=in_rows & in_columns, other=0.0)
            k_tile = tl.load(k_at + columns, mask=in_keys & in_columns, other=0.0)
            scores = tl.dot(k_tile, tl.trans(q_tile), scores, input_precision="ieee", out_dtype=ACC)
        scores = scores / tl.sqrt(width.to(ACC)) + added
        top = tl.max(scores, 0, keep_dims=True)
        weights = tl.exp(scores - tl.where(top == float("-inf"), 0.0, top))
        total = tl.sum(weights, 0, keep_dims=True)
        mean += weights / tl.where(total == 0, 1.0, total)
    out_at = out + (batch * queries + rows)[None, :] * keys + at[:, None]
    tl.store(out_at, mean / heads, mask=in_keys & (rows < queries)[None, :])


def blocks_of(width: int) -> tuple[int, int]:
    """Columns of the two blocks that a head of this width is loaded in."""
    return next(blocks for widest, blocks in BLOCKS.items() if width <= widest)


def tiles_for(blocks: tuple[int, int]) -> tuple[Config, ...]:
    """All tiles of the forward pass, the default first."""
    return (FORWARD, *MORE.get(blocks, ()))


def sizes_of(query: Tensor, key: Tensor, heads: int) -> tuple[int, int, int, int]:
    """Queries, keys, heads and eighths of a head's width."""
    return query.shape[1], key.shape[1], heads, query.shape[2] // heads // 8


def strides_of(*tensors: Tensor) -> list[int]:
    """Of each tensor, from one sample and from one row to the next."""
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def mask_or_nothing(mask: Tensor | None, query: Tensor) -> tuple[Tensor, int]:
    """The additive mask and how many keys of a sample have one; without one, memory that is never read."""
    if mask is None:
        return query.new_empty(1, dtype=accumulator(query.dtype)), 0
    return mask.contiguous(), mask.shape[1]


def launch(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    """The output `[B, T, C]`, contiguous; `mask` `[B, S]` is additive, in the accumulator's dtype."""
    batch, queries, columns = query.shape
    out = query.new_empty((batch, queries, columns))
    wide, rest = blocks_of(columns // heads)
    config = dispatch.tile(key_of(query, heads), "forward", query.device, tiles_for((wide, rest)))
    added, masked = mask_or_nothing(mask, query)
    short_key_forward[(triton.cdiv(queries, config.rows), batch * heads)](
        query, key, value, added, out, *sizes_of(query, key, heads), *strides_of(query, key, value), masked,
        KEYS=MAX_KEYS, WIDE=wide, REST=rest, BM=config.rows, ACC=sums_in(query.dtype),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out


def launch_map(query: Tensor, key: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    """The mean of the probabilities over the heads, `[B, T, S]`, in the accumulator's dtype."""
    batch, queries, _ = query.shape
    out = query.new_empty((batch, queries, key.shape[1]), dtype=accumulator(query.dtype))
    added, masked = mask_or_nothing(mask, query)
    short_key_map[(triton.cdiv(queries, MAP.rows), batch)](
        query, key, added, out, *sizes_of(query, key, heads), *strides_of(query, key), masked,
        KEYS=MAX_KEYS, BK=MAP_COLUMNS, BM=MAP.rows, ACC=sums_in(query.dtype),
        num_warps=MAP.warps, num_stages=MAP.stages,
    )  # fmt: skip
    return out


def form(
    kernel: Any, label: str, pointers: dict[str, str], sizes: str, constants: dict[str, Any], config: Config
) -> Shipped:
    """A compiled form; strides are taken to be divisible by 16, as at real sizes."""
    constants = {"KEYS": MAX_KEYS, **constants, "BM": config.rows, "ACC": tl.float32}
    signature = {**pointers, **dict.fromkeys(sizes.split(), "i32"), **dict.fromkeys(constants, "constexpr")}
    divisible = (*pointers, *(name for name in sizes.split() if name.endswith(("_batch", "_row"))))
    return Shipped(kernel, label, signature, constants, config.warps, config.stages, divisible)


def shipped() -> list[Shipped]:
    """The forward pass for heads up to 48, 64, 80 and 160 wide, and one map for all of them."""
    sizes = "queries keys heads eighths q_batch q_row k_batch k_row"
    pointers = {"q": "*bf16", "k": "*bf16", "mask": "*fp32", "out": "*fp32"}
    label = f"{MAP.rows} queries, any width"
    found = [form(short_key_map, label, pointers, f"{sizes} masked", {"BK": MAP_COLUMNS}, MAP)]
    pointers = {"q": "*bf16", "k": "*bf16", "v": "*bf16", "mask": "*fp32", "out": "*bf16"}
    for width, (wide, rest) in BLOCKS.items():
        for config in tiles_for((wide, rest)):
            label, constants = f"{config.rows} queries, width {width}", {"WIDE": wide, "REST": rest}
            found.append(form(short_key_forward, label, pointers, f"{sizes} v_batch v_row masked", constants, config))
    return found
