"""`bank_lora`: the operator with its gradients, registered with torch, and the choice of a backend.

Eager steps of small batches wait for the host, so there the kernels are launched from an `autograd.Function`; the
registered operator, which takes the host twice as long, is for `torch.compile` and for tensors without values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_kernels import backend as backends
from lit_kernels.bank_lora import fallback, reference
from lit_kernels.dispatch import padded_rank
from lit_kernels.table_files import Key

NAME = "bank_lora"
MAX_RANK = 64


def bank_lora(
    x: Tensor,
    weight: Tensor,
    downs_GRK: Tensor,
    ups_GNR: Tensor,
    scales_G: Tensor,
    bias: Tensor | None = None,
    backend: backends.Backend = "auto",
) -> Tensor:
    """y = x Wᵀ + bias + s_g · (x A_gᵀ) B_gᵀ, where rows are shared out to the G adapters equally and in order.

    With M rows in all, row m has adapter g = m // (M / G): a batch of G·b samples holds b of each adapter, side by
    side. G = 1 is an ordinary LoRA layer. What is not finite in one adapter's factors, scale, rows or gradients leaves
    every other adapter's results and gradients as they are, bit for bit. Differentiable in x, A and B; s has no
    gradient. A W or a bias that learns is trained by the fallback.

    Args:
        x: `[..., K]`, fp64, fp32, fp16 or bf16.
        weight: W, `[N, K]`, and `bias` `[N]`, in x's dtype.
        downs_GRK: A of each adapter. Any dtype: products are taken in x's, and gradients come back in the factors' own.
        ups_GNR: B of each adapter.
        scales_G: s, a tensor, so that another strength compiles nothing anew.
        backend: See `lit_kernels.backend`. "auto" takes the kernels for fp16 and bf16: products in fp32 and fp64 are
            left to torch.

    Returns:
        `[..., N]`, in x's dtype.

    Raises:
        ValueError: Shapes or dtypes do not fit, the rows cannot be shared out equally, or the backend cannot run here.
    """
    _check(x, weight, downs_GRK, ups_GNR, scales_G, bias)
    rows = x.reshape(-1, x.shape[-1])
    if backend == "reference":
        return reference.bank_lora(rows, weight, downs_GRK, ups_GNR, scales_G, bias).unflatten(0, x.shape[:-1])
    reason = unsupported(rows, weight, downs_GRK.shape[1], bias)
    if backend == "auto" and x.dtype not in (torch.float16, torch.bfloat16):
        reason = reason or f"torch multiplies {x.dtype} as fast"
    adapters, rank = downs_GRK.shape[:2]
    key = key_of(x.dtype, len(rows) // adapters, weight, adapters, rank)
    if backends.choose(NAME, backend, x.device, reason, key) == "fallback":
        return fallback.bank_lora(rows, weight, downs_GRK, ups_GNR, scales_G, bias).unflatten(0, x.shape[:-1])
    return launched(x, [weight], [downs_GRK], [ups_GNR], scales_G[None], bias)[0]


def launched(
    x: Tensor, weights: Sequence[Tensor], downs: Sequence[Tensor], ups: Sequence[Tensor], scales_PG: Tensor,
    bias: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """The kernels on up to three layers of one x, which are parts of one launch. Nothing is checked.

    Args:
        x: `[..., K]`.
        weights: W `[N, K]` of each part, all of one shape.
        downs: A of each part, `[G, R, K]`, or `[R, K]` for one adapter; all of one rank.
        ups: B, `[G, N, R]` or `[N, R]`.
        scales_PG: s of each part and adapter, contiguous.
        bias: `[N]`, for one part only.

    Returns:
        `[..., N]` for each part.
    """
    x = x.contiguous()
    if backends.launches_directly(x):
        found = _Directly.apply(x, scales_PG, bias, *weights, *downs, *ups)
    else:
        none = [None] * (3 - len(weights))
        found = torch.ops.lit_kernels.bank_lora(x, scales_PG, bias, *weights, *none, *downs, *none, *ups, *none)
    return list(found[: len(weights)])


def _launch(x: Tensor, scales: Tensor, bias: Tensor | None, *factors: Tensor) -> tuple[Tensor, ...]:
    from lit_kernels.bank_lora import forward

    weights, downs, ups = _parts(factors)
    ys, s = forward.launch(x, weights, downs, ups, scales, None if bias is None else bias.contiguous())
    return *ys, s


def _launch_backward(
    x: Tensor, s: Tensor, scales: Tensor, grads: Sequence[Tensor], factors: Sequence[Tensor],
    needs_x: bool, needs_down: bool, needs_up: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from lit_kernels.bank_lora import backward

    grads = [grad.contiguous() for grad in grads]
    return backward.launch(grads, x, s, *_parts(factors), scales, needs_x, needs_down, needs_up)


def _parts(factors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """W, A and B of the parts, out of all W, all A and all B."""
    own = [factor.contiguous() for factor in factors]
    parts = len(own) // 3
    return own[:parts], own[parts : 2 * parts], own[2 * parts :]


def _there(factors: Sequence[Tensor | None]) -> list[Tensor]:
    return [factor for factor in factors if factor is not None]


@torch.library.custom_op("lit_kernels::bank_lora", mutates_args=())
def _forward(
    x: Tensor, scales: Tensor, bias: Tensor | None,
    w0: Tensor, w1: Tensor | None, w2: Tensor | None, a0: Tensor, a1: Tensor | None, a2: Tensor | None,
    b0: Tensor, b1: Tensor | None, b2: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    *ys, s = _launch(x, scales, bias, *_there((w0, w1, w2, a0, a1, a2, b0, b1, b2)))
    y0, y1, y2 = *ys, *(x.new_empty(0) for _ in range(3 - len(ys)))
    return y0, y1, y2, s


@_forward.register_fake
def _(x: Tensor, scales: Tensor, bias: Tensor | None, *factors: Tensor | None) -> tuple[Tensor, ...]:
    ys = [x.new_empty((0,) if w is None else (*x.shape[:-1], len(w))) for w in factors[:3]]
    rank = _there(factors[3:4])[0].shape[-2]
    return *ys, x.new_empty((len(scales), x.shape[:-1].numel(), rank))


@torch.library.custom_op("lit_kernels::bank_lora_backward", mutates_args=())
def _backward(
    x: Tensor, s: Tensor, scales: Tensor, grads: Sequence[Tensor], factors: Sequence[Tensor],
    needs_x: bool, needs_down: bool, needs_up: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _launch_backward(x, s, scales, grads, factors, needs_x, needs_down, needs_up)


@_backward.register_fake
def _(
    x: Tensor, s: Tensor, scales: Tensor, grads: Sequence[Tensor], factors: Sequence[Tensor],
    needs_x: bool, needs_down: bool, needs_up: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    def like(factor: Tensor, needed: bool) -> Tensor:
        return factor.new_empty((*scales.shape, *factor.shape[-2:]) if needed else (0,))

    parts = len(scales)
    dx = x.new_empty(x.shape if needs_x else (0,))
    return dx, like(factors[parts], needs_down), like(factors[2 * parts], needs_up)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, scales, _, *factors = inputs
    ctx.save_for_backward(x, output[-1], scales, *_there(factors))
    ctx.mark_non_differentiable(output[-1])
    ctx.set_materialize_grads(False)  # zeros for the gradient of S would be a launch


def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x, s, scales, *factors = ctx.saved_tensors
    parts, needs = len(scales), ctx.needs_input_grad
    found: list[Tensor | None] = [None] * len(needs)
    if all(grad is None for grad in grads[:parts]):
        return tuple(found)
    own = [x.new_zeros((*x.shape[:-1], len(factors[0]))) if g is None else g for g in grads[:parts]]
    down_at = 3 + (len(needs) - 3) // 3  # the registered operator has places for three parts
    up_at = 2 * down_at - 3
    needed = needs[0], True in needs[down_at:up_at], True in needs[up_at:]
    launch = _launch_backward if backends.launches_directly(x) else torch.ops.lit_kernels.bank_lora_backward
    dx, d_downs, d_ups = launch(x, s, scales, own, factors, *needed)
    found[0] = dx if needed[0] else None
    for at, whole, begin in ((down_at, d_downs, parts), (up_at, d_ups, 2 * parts)):
        for part in range(parts):
            if needs[at + part]:
                own_share = whole if parts == 1 else whole[part]
                found[at + part] = own_share.view(factors[begin + part].shape)
    return tuple(found)


_forward.register_autograd(_gradients, setup_context=_save)
_Directly = backends.directly(NAME, _launch, _save, _gradients)


def key_of(dtype: torch.dtype, rows_each: int, weight: Tensor, adapters: int, rank: int) -> Key:
    """What tables know a layer by; `rows` are one adapter's, and layers in one launch are looked up one by one."""
    width, depth = weight.shape
    sizes = {"rank": padded_rank(rank), "rows": rows_each, "adapters": adapters, "width": width, "depth": depth}
    return Key(NAME, dtype, sizes)


def unsupported(x: Tensor, weight: Tensor, rank: int, bias: Tensor | None) -> str:
    """Why the kernels do not take this case; empty where they do."""
    if rank > MAX_RANK:
        return f"rank {rank} is above {MAX_RANK}"
    if not x.numel():
        return "there are no rows"
    if (weight.requires_grad or (bias is not None and bias.requires_grad)) and torch.is_grad_enabled():
        return "W or its bias learns"
    return ""


def _check(x: Tensor, weight: Tensor, downs: Tensor, ups: Tensor, scales: Tensor, bias: Tensor | None) -> None:
    if x.ndim < 2 or weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"{NAME}: W {list(weight.shape)} does not fit x {list(x.shape)}")
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(f"{NAME}: x is {x.dtype}, W {weight.dtype}; W and bias must have x's dtype")
    width, depth = weight.shape
    if downs.ndim != 3 or downs.shape[2] != depth or ups.shape != (len(downs), width, downs.shape[1]):
        wanted = f"[G, R, {depth}] and [G, {width}, R]"
        raise ValueError(f"{NAME}: A {list(downs.shape)} and B {list(ups.shape)} are not {wanted}")
    if scales.shape != (len(downs),) or (bias is not None and bias.shape != (width,)):
        raise ValueError(f"{NAME}: {len(downs)} adapters need as many scales, and a bias must be [{width}]")
    if (count := x.shape[:-1].numel()) % len(downs):
        raise ValueError(f"{NAME}: {count} rows cannot be shared out equally to {len(downs)} adapters")
