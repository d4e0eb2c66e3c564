"""Triton: AdamW of a whole bank in two launches.

The first sums squares of gradients in at most `PARTS` parts an adapter; in the second every program adds up its own
adapter's parts, in one order, and so knows norm, clipping and skip without a launch in between. What depends on the
step count alone is computed in fp64: in fp32, 1 - 0.999 has four digits. Cuts depend on P only, never on G.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_kernels.compiling import Shipped
from lit_kernels.tiles import accumulator

PARTS = 256
BLOCK = 1024
WARPS = 4


@triton.jit
def bank_adamw_squares(grad, parts, width, part, parts_each, BLOCK: tl.constexpr, ACC: tl.constexpr):
    g = (tl.program_id(0) // parts_each).to(tl.int64)
    begin = tl.program_id(0) % parts_each * part
    end = min(begin + part, width)
    acc = tl.zeros((BLOCK,), ACC)
    for at in range(begin, end, BLOCK):
        i = at + tl.arange(0, BLOCK)
        value = tl.load(grad + g * width + i, mask=i < end, other=0.0).to(ACC)
        acc += value * value
    tl.store(parts + tl.program_id(0), tl.sum(acc, axis=0))


@triton.jit
def bank_adamw_update(
    master, m, v, grad, shadow, parts, lr, weight_decay, step, max_norm, applied,
    width, parts_each, blocks_each,
    BETA1: tl.constexpr, BETA2: tl.constexpr, LOG1: tl.constexpr, LOG2: tl.constexpr, EPS: tl.constexpr,
    SHADOW: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    g = (tl.program_id(0) // blocks_each).to(tl.int64)
    block = tl.program_id(0) % blocks_each
    p = tl.arange(0, PARTS)
    norm = tl.sqrt(tl.sum(tl.load(parts + g * parts_each + p, mask=p < parts_each, other=0.0), axis=0))
    finite = norm < float("inf")  # nor is NaN
    if block == 0:
        tl.store(applied + g, finite)
    if finite:
        clip = tl.minimum(tl.load(max_norm + g).to(ACC) / (norm + tl.full((), 1e-6, ACC)), 1.0)
        rate = tl.load(lr + g).to(tl.float64)
        steps = (tl.load(step + g) + 1).to(tl.float64)
        decay = (1.0 - rate * tl.load(weight_decay + g).to(tl.float64)).to(ACC)
        rate = (rate / (1.0 - tl.exp(steps * tl.full((), LOG1, tl.float64)))).to(ACC)
        root = tl.sqrt(1.0 - tl.exp(steps * tl.full((), LOG2, tl.float64))).to(ACC)
        i = block * BLOCK + tl.arange(0, BLOCK)
        mask = i < width
        at = g * width + i
        gradient = tl.load(grad + at, mask=mask, other=0.0).to(ACC) * clip
        first = tl.load(m + at, mask=mask, other=0.0)
        second = tl.load(v + at, mask=mask, other=0.0)
        theta = tl.load(master + at, mask=mask, other=0.0)
        first += (gradient - first) * tl.full((), 1 - BETA1, ACC)
        second = second * tl.full((), BETA2, ACC) + gradient * gradient * tl.full((), 1 - BETA2, ACC)
        theta = theta * decay - rate * (first / (tl.sqrt(second) / root + tl.full((), EPS, ACC)))
        tl.store(m + at, first, mask=mask)
        tl.store(v + at, second, mask=mask)
        tl.store(master + at, theta, mask=mask)
        if SHADOW:
            tl.store(shadow + at, theta.to(shadow.dtype.element_ty), mask=mask)


def launch(
    master_GP: Tensor, m_GP: Tensor, v_GP: Tensor, grad_GP: Tensor, lr_G: Tensor, weight_decay_G: Tensor,
    step_G: Tensor, max_norm_G: Tensor, betas: tuple[float, float], eps: float, shadow_GP: Tensor | None,
) -> Tensor:  # fmt: skip
    """One step in place of contiguous tensors, the step count not yet advanced; bool `[G]`: who made it."""
    adapters, width = master_GP.shape
    part = triton.cdiv(triton.cdiv(width, PARTS), BLOCK) * BLOCK
    parts_each, blocks_each = triton.cdiv(width, part), triton.cdiv(width, BLOCK)
    parts = master_GP.new_empty((adapters, parts_each))
    applied = torch.empty(adapters, dtype=torch.bool, device=master_GP.device)
    acc = accumulator(master_GP.dtype)
    bank_adamw_squares[(adapters * parts_each,)](
        grad_GP, parts, width, part, parts_each, BLOCK=BLOCK, ACC=acc, num_warps=WARPS
    )
    bank_adamw_update[(adapters * blocks_each,)](
        master_GP, m_GP, v_GP, grad_GP, master_GP if shadow_GP is None else shadow_GP, parts,
        lr_G, weight_decay_G, step_G, max_norm_G, applied,
        width, parts_each, blocks_each,
        **_constants(betas, eps, shadow_GP is not None), ACC=acc, num_warps=WARPS,
    )  # fmt: skip
    return applied


def _constants(betas: tuple[float, float], eps: float, shadow: bool) -> dict[str, float]:
    log1, log2 = (math.log(beta) if beta else -math.inf for beta in betas)
    return {
        "BETA1": betas[0], "BETA2": betas[1], "LOG1": log1, "LOG2": log2, "EPS": eps, "SHADOW": shadow,
        "PARTS": PARTS, "BLOCK": BLOCK,
    }  # fmt: skip


def shipped() -> list[Shipped]:
    """Both launches in fp32, the second with a bf16 shadow."""
    fp32 = dict.fromkeys(("master", "m", "v", "grad"), "*fp32")
    one_each = {"lr": "*fp32", "weight_decay": "*fp32", "step": "*i64", "max_norm": "*fp32", "applied": "*i1"}
    update = {**fp32, "shadow": "*bf16", "parts": "*fp32", **one_each}
    made = []
    for kernel, config, pointers, sizes, constants in (
        (bank_adamw_squares, "norms", {"grad": "*fp32", "parts": "*fp32"}, ("width", "part", "parts_each"),
         {"BLOCK": BLOCK}),
        (bank_adamw_update, "update with shadow", update, ("width", "parts_each", "blocks_each"),
         _constants((0.9, 0.999), 1e-8, True)),
    ):  # fmt: skip
        constants = {**constants, "ACC": tl.float32}
        signature = {**pointers, **dict.fromkeys(sizes, "i32"), **dict.fromkeys(constants, "constexpr")}
        made.append(Shipped(kernel, config, signature, constants, WARPS, 3, (*pointers, "width"), dots=False))
    return made
