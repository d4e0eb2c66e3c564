"""Triton: softmax(x G_nᵀ) of every head, scores in registers.

A program computes one tile of rows for one head. It walks over C, so that no row of x need fit into shared memory, and
keeps the scores of all S keys: 64 and a tail of 16 (77 make 80 columns and not 128) or 64. What it writes is already
the left side of one plain matrix product over all heads and keys, [T, N·S] times U [N·S, C], whose sums cross heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_kernels import dispatch
from lit_kernels.absorbed_attention.function import key_of
from lit_kernels.compiling import Shipped
from lit_kernels.tiles import Config, accumulator

FIRST = 64
"""Keys before the tail."""


@triton.jit
def absorbed_probabilities(
    x, keys, found, rows, depth, key_count, heads, x_stride, x_prompt,
    FIRST: tl.constexpr, TAIL: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    row = (tl.program_id(0) // heads).to(tl.int64) * BM
    prompt = tl.program_id(1).to(tl.int64)
    ms = tl.arange(0, BM)
    ks = tl.arange(0, BK)
    a = tl.arange(0, FIRST)
    b = FIRST + tl.arange(0, TAIL)
    in_rows = ms < rows - row
    x_at = x + prompt * x_prompt + row * x_stride + ms[:, None] * x_stride + ks[None, :]
    keys_at = keys + (prompt * heads + head) * key_count * depth
    a_at = keys_at + a[None, :] * depth + ks[:, None]
    b_at = keys_at + b[None, :] * depth + ks[:, None]
    a_scores = tl.zeros((BM, FIRST), ACC)
    b_scores = tl.zeros((BM, TAIL), ACC)
    for k in range(0, depth, BK):
        in_k = ks < depth - k
        x_tile = tl.load(x_at, mask=in_rows[:, None] & in_k[None, :], other=0.0)
        a_tile = tl.load(a_at, mask=in_k[:, None] & (a < key_count)[None, :], other=0.0)
        b_tile = tl.load(b_at, mask=in_k[:, None] & (b < key_count)[None, :], other=0.0)
        a_scores = tl.dot(x_tile, a_tile, a_scores, input_precision="ieee", out_dtype=ACC)
        b_scores = tl.dot(x_tile, b_tile, b_scores, input_precision="ieee", out_dtype=ACC)
        x_at += BK
        a_at += BK
        b_at += BK
    a_scores = tl.where((a < key_count)[None, :], a_scores, float("-inf"))
    b_scores = tl.where((b < key_count)[None, :], b_scores, float("-inf"))
    top = tl.maximum(tl.max(a_scores, axis=1), tl.max(b_scores, axis=1))
    a_scores = tl.exp(a_scores - top[:, None])
    b_scores = tl.exp(b_scores - top[:, None])
    total = tl.sum(a_scores, axis=1) + tl.sum(b_scores, axis=1)
    cd = found.dtype.element_ty
    found_at = found + ((prompt * rows + row) * heads + head) * key_count + ms[:, None] * (heads * key_count)
    a_in = in_rows[:, None] & (a < key_count)[None, :]
    b_in = in_rows[:, None] & (b < key_count)[None, :]
    tl.store(found_at + a[None, :], (a_scores / total[:, None]).to(cd), mask=a_in)
    tl.store(found_at + b[None, :], (b_scores / total[:, None]).to(cd), mask=b_in)


def tiles_for(rows: int, keys: int, dtype: torch.dtype) -> list[Config]:
    """All tiles for the tokens of a prompt, the default first; 128 bytes deep, with columns for all keys."""
    depth = max(16, 128 // dtype.itemsize)
    if keys > FIRST + 16:
        return [Config(64, FIRST + 64, depth, 4, 3)]
    found = [Config(64, FIRST + 16, depth, 4, 3), Config(128, FIRST + 16, depth, 8, 3)]
    found = found if rows <= 512 else found[::-1]
    return [*found, Config(32, FIRST + 16, depth, 4, 3)] if dtype.itemsize == 2 else found[:1]


def launch(x_PTC: Tensor, keys_PNSC: Tensor) -> Tensor:
    """Probabilities `[P, T, N·S]` in x's dtype; G is contiguous, rows of x may stand apart."""
    (prompts, rows, depth), (_, heads, keys, _) = x_PTC.shape, keys_PNSC.shape
    key = key_of(x_PTC.dtype, prompts, rows, heads, keys, depth)
    config = dispatch.tile(key, "forward", x_PTC.device, tiles_for(rows, keys, x_PTC.dtype))
    found = x_PTC.new_empty((prompts, rows, heads * keys))
    absorbed_probabilities[(triton.cdiv(rows, config.rows) * heads, prompts)](
        x_PTC, keys_PNSC, found, rows, depth, keys, heads, x_PTC.stride(1), x_PTC.stride(0),
        FIRST=FIRST, TAIL=config.columns - FIRST, BM=config.rows, BK=config.depth, ACC=accumulator(x_PTC.dtype),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return found


def shipped() -> list[Shipped]:
    """Each tile with 77 keys and with 128, in bf16."""
    pointers = dict.fromkeys(("x", "keys", "found"), "*bf16")
    sizes = dict.fromkeys(("rows", "depth", "key_count", "heads", "x_stride", "x_prompt"), "i32")
    made = []
    for config in (config for keys in (77, 128) for config in tiles_for(1, keys, torch.bfloat16)):
        constants = {
            "FIRST": FIRST, "TAIL": config.columns - FIRST, "BM": config.rows, "BK": config.depth, "ACC": tl.float32
        }  # fmt: skip
        signature = {**pointers, **sizes, **dict.fromkeys(constants, "constexpr")}
        label = f"{config.rows}x{config.columns}x{config.depth}"
        divisible = (*pointers, "depth", "x_stride", "x_prompt")
        made.append(
            Shipped(absorbed_probabilities, label, signature, constants, config.warps, config.stages, divisible)
        )
    return made
