"""`bank_lora`: the operator with its gradients, registered with torch, and the choice of a backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_kernels import backend as backends
from lit_kernels.bank_lora import fallback, reference

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
    unsupported = _unsupported(rows, weight, downs_GRK, bias)
    if backend == "auto" and x.dtype not in (torch.float16, torch.bfloat16):
        unsupported = unsupported or f"torch multiplies {x.dtype} as fast"
    if backends.choose(NAME, backend, x.device, unsupported) == "fallback":
        y = fallback.bank_lora(rows, weight, downs_GRK, ups_GNR, scales_G, bias)
    else:
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        y, _ = torch.ops.lit_kernels.bank_lora(rows, weight, downs_GRK, ups_GNR, scales_G, bias)
    return y.unflatten(0, x.shape[:-1])


@torch.library.custom_op("lit_kernels::bank_lora", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, downs: Tensor, ups: Tensor, scales: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    from lit_kernels.bank_lora import forward

    return forward.launch(
        x, weight.contiguous(), downs.contiguous(), ups.contiguous(), scales.contiguous(),
        None if bias is None else bias.contiguous(),
    )  # fmt: skip


@_forward.register_fake
def _(
    x: Tensor, weight: Tensor, downs: Tensor, ups: Tensor, scales: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty((len(x), len(weight))), x.new_empty((len(x), downs.shape[1]))


@torch.library.custom_op("lit_kernels::bank_lora_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, s: Tensor, weight: Tensor, downs: Tensor, ups: Tensor, scales: Tensor,
    needs_x: bool, needs_down: bool, needs_up: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from lit_kernels.bank_lora import backward

    return backward.launch(
        grad.contiguous(), x, s, weight.contiguous(), downs.contiguous(), ups.contiguous(), scales.contiguous(),
        needs_x, needs_down, needs_up,
    )  # fmt: skip


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, s: Tensor, weight: Tensor, downs: Tensor, ups: Tensor, scales: Tensor,
    needs_x: bool, needs_down: bool, needs_up: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    def like(tensor: Tensor, needed: bool) -> Tensor:
        return tensor.new_empty(tensor.shape if needed else (0,))

    return like(x, needs_x), like(downs, needs_down), like(ups, needs_up)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, downs, ups, scales, _ = inputs
    ctx.save_for_backward(x, weight, downs, ups, scales, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for the gradient of S would be a launch


def _gradients(ctx: Any, grad: Tensor | None, grad_s: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    x, weight, downs, ups, scales, s = ctx.saved_tensors
    needs_x, _, needs_down, needs_up = ctx.needs_input_grad[:4]
    dx, d_down, d_up = torch.ops.lit_kernels.bank_lora_backward(
        grad, x, s, weight, downs, ups, scales, needs_x, needs_down, needs_up
    )
    return dx if needs_x else None, None, d_down if needs_down else None, d_up if needs_up else None, None, None


_forward.register_autograd(_gradients, setup_context=_save)


def _unsupported(rows: Tensor, weight: Tensor, downs: Tensor, bias: Tensor | None) -> str:
    if downs.shape[1] > MAX_RANK:
        return f"rank {downs.shape[1]} is above {MAX_RANK}"
    if not len(rows):
        return "there are no rows"
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
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
