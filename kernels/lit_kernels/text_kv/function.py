"""`text_key_values`: the operator with its gradients, registered with torch, and the choice of a backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_kernels import backend as backends
from lit_kernels.dispatch import padded_rank
from lit_kernels.packing import packed
from lit_kernels.table_files import Key
from lit_kernels.text_kv import fallback, reference

NAME = "text_key_values"
MAX_RANK = 64


def text_key_values(
    text_BSD: Tensor,
    weights: Sequence[Tensor],
    downs: Sequence[Tensor] = (),
    ups: Sequence[Tensor] = (),
    scales: Tensor | None = None,
    detach_first_token: bool = False,
    backend: backends.Backend = "auto",
) -> list[Tensor]:
    """K and V of all cross-attention layers from one text tensor: y = x Wᵀ + s · (x Aᵀ) Bᵀ for each slice.

    Differentiable in the text, W, A and B; s has no gradient. Results are views of one tensor.

    Args:
        text_BSD: `[B, S, D]`, fp64, fp32, fp16 or bf16.
        weights: W of each slice, `[C, D]`, of any widths C; nothing is copied where they lie side by side in memory
            (`lit_kernels.packing.lay_side_by_side`). Of another dtype, as masters in fp32 are, they are cast to the
            text's, and their gradients come back in their own.
        downs: A of each slice, `[R, D]`, all of one rank; none for the projections alone. Any dtype: products are
            taken in the text's, and gradients come back in the factors' own.
        ups: B of each slice, `[C, R]`.
        scales: s `[G]`, a tensor, so that another strength compiles nothing anew.
        detach_first_token: No gradient through what token 0 gives (Custom Diffusion's start token).
        backend: See `lit_kernels.backend`. "auto" takes the kernels for fp16 and bf16: products in fp32 and fp64 are
            left to torch. Without factors every backend but "reference" is one matrix product.

    Returns:
        One `[B, S, C]` a slice, in the text's dtype.

    Raises:
        ValueError: Shapes do not fit, or the backend cannot run here.
    """
    _check(text_BSD, weights, downs, ups, scales)
    if backend == "reference":
        return reference.text_key_values(text_BSD, weights, downs, ups, scales, detach_first_token)
    rank = len(downs[0]) if downs else 0
    unsupported = f"rank {rank} is above {MAX_RANK}" if rank > MAX_RANK else "" if rank else "no factors"
    if backend == "auto" and text_BSD.dtype not in (torch.float16, torch.bfloat16):
        unsupported = unsupported or f"torch multiplies {text_BSD.dtype} as fast"
    batch, tokens, depth = text_BSD.shape
    widths = [len(weight) for weight in weights]
    key = key_of(text_BSD.dtype, rank, batch * tokens, sum(widths)) if rank else None
    path = backends.choose(NAME, backend if rank else "fallback", text_BSD.device, unsupported, key)
    if path == "fallback" or scales is None:
        return fallback.text_key_values(text_BSD, weights, downs, ups, scales, detach_first_token)
    down = packed(downs).view(len(downs), rank, depth)
    text = text_BSD.reshape(batch * tokens, depth)
    text = text if text.stride(1) == 1 else text.contiguous()
    y, _ = torch.ops.lit_kernels.text_key_values(
        text, packed(weights).to(text.dtype), down, packed(ups), scales, widths, tokens if detach_first_token else 0
    )
    return [part.unflatten(0, (batch, tokens)) for part in y.split(widths, dim=1)]


def key_of(dtype: torch.dtype, rank: int, rows: int, columns: int) -> Key:
    """What tables know a case by; the text's width comes with the number of all columns."""
    return Key("text_kv", dtype, {"rank": padded_rank(rank), "rows": rows, "columns": columns})


@torch.library.custom_op("lit_kernels::text_key_values", mutates_args=())
def _forward(
    text: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: Tensor, widths: Sequence[int], period: int
) -> tuple[Tensor, Tensor]:
    from lit_kernels.text_kv import forward

    return forward.launch(text, weight.contiguous(), down.contiguous(), up.contiguous(), scale, widths)


@_forward.register_fake
def _(
    text: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: Tensor, widths: Sequence[int], period: int
) -> tuple[Tensor, Tensor]:
    rows = text.shape[0]  # len() would fix the size
    return text.new_empty((rows, weight.shape[0])), text.new_empty((rows, *down.shape[:2]))


@torch.library.custom_op("lit_kernels::text_key_values_backward", mutates_args=())
def _backward(
    grad: Tensor, s: Tensor, up: Tensor, scale: Tensor, widths: Sequence[int], period: int
) -> tuple[Tensor, Tensor]:
    from lit_kernels.text_kv import backward

    return backward.launch(grad.contiguous(), s, up.contiguous(), scale, widths, period)


@_backward.register_fake
def _(
    grad: Tensor, s: Tensor, up: Tensor, scale: Tensor, widths: Sequence[int], period: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(up, memory_format=torch.contiguous_format), torch.empty_like(s)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    text, weight, down, up, scale, ctx.widths, ctx.period = inputs
    ctx.save_for_backward(text, weight, down, up, scale, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for the gradient of s would be a launch


def _gradients(ctx: Any, grad: Tensor | None, grad_s: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    text, weight, down, up, scale, s = ctx.saved_tensors
    needs_text, needs_weight, needs_down, needs_up = ctx.needs_input_grad[:4]
    learns = None
    if ctx.period:
        learns = (torch.arange(len(text), device=text.device) % ctx.period != 0)[:, None]
    d_text = d_weight = d_down = d_up = None
    if needs_text or needs_down or needs_up:
        d_up, ds = torch.ops.lit_kernels.text_key_values_backward(grad, s, up, scale, ctx.widths, ctx.period)
        ds = ds.flatten(1)
        if needs_down:  # rows of ds that learn nothing are zero
            d_down = _product(ds.T, text, down.dtype).view_as(down)
        if needs_text:
            d_text = _product(grad, weight, text.dtype) + ds @ down.flatten(0, 1).to(ds.dtype)
            d_text = d_text if learns is None else d_text.where(learns, torch.zeros_like(d_text))
    if needs_weight:
        seen = text if learns is None else text.where(learns, torch.zeros_like(text))
        d_weight = _product(grad.T, seen, weight.dtype)
    return d_text, d_weight, d_down, d_up if needs_up else None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, out in `dtype` without a rounding in between."""
    if left.dtype == right.dtype == dtype:
        return left @ right
    if left.is_cuda and dtype == torch.float32 and left.dtype == right.dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def _check(
    text: Tensor, weights: Sequence[Tensor], downs: Sequence[Tensor], ups: Sequence[Tensor], scales: Tensor | None
) -> None:
    if not weights:
        raise ValueError(f"{NAME}: no slice")
    depth = text.shape[-1]
    for g, weight in enumerate(weights):
        if weight.shape[1:] != (depth,):
            raise ValueError(f"{NAME}: weight {g} is {list(weight.shape)}, the text {depth} wide")
    if not downs and not ups:
        return
    if not len(downs) == len(ups) == len(weights) or scales is None or scales.shape != (len(weights),):
        raise ValueError(f"{NAME}: {len(weights)} weights need as many A, B and scales")
    rank = len(downs[0])
    for g, (weight, down, up) in enumerate(zip(weights, downs, ups, strict=True)):
        if down.shape != (rank, depth) or up.shape != (len(weight), rank):
            shapes = f"A {list(down.shape)} and B {list(up.shape)}"
            raise ValueError(f"{NAME}: slice {g} has {shapes}, not {[rank, depth]} and {[len(weight), rank]}")
