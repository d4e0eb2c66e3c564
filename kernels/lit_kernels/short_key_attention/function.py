"""`short_key_attention`: the operator with its gradients, registered with torch, and the choice of a backend."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from lit_kernels import backend as backends
from lit_kernels.short_key_attention import fallback, reference
from lit_kernels.table_files import Key

NAME = "short_key_attention"
MAX_KEYS = 128
MAX_WIDTH = 160


@overload
def short_key_attention(
    query_BTC: Tensor,
    key_BSC: Tensor,
    value_BSC: Tensor,
    heads: int,
    mask_BS: Tensor | None = None,
    want_map: Literal[False] = False,
    backend: backends.Backend = "auto",
) -> Tensor: ...


@overload
def short_key_attention(
    query_BTC: Tensor,
    key_BSC: Tensor,
    value_BSC: Tensor,
    heads: int,
    mask_BS: Tensor | None = None,
    *,
    want_map: Literal[True],
    backend: backends.Backend = "auto",
) -> tuple[Tensor, Tensor]: ...


def short_key_attention(
    query_BTC: Tensor,
    key_BSC: Tensor,
    value_BSC: Tensor,
    heads: int,
    mask_BS: Tensor | None = None,
    want_map: bool = False,
    backend: backends.Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of image tokens to a short text: softmax(Q Kᵀ / sqrt(H) + mask) V of every head.

    Differentiable in Q, K and V, once; only they and the mask are kept for the backward pass.

    Args:
        query_BTC: `[B, T, C]`, the heads side by side in C. This and the next two may be views with any strides, such
            as slices of a wider tensor; only where the last stride is not 1 they are copied.
        key_BSC: `[B, S, C]`, of the queries' dtype: fp64, fp32, fp16 or bf16.
        value_BSC: `[B, S, C]`.
        heads: N; a head is H = C / N wide.
        mask_BS: `[B, S]`, the same for all heads and queries: boolean (True: the key takes part) or added to the
            scores. It has no gradient. A sample whose keys are all masked (False, or -inf) gets zeros and gives no
            gradient, as with `F.scaled_dot_product_attention`.
        want_map: Also return the mean of the probabilities over the heads. It is not differentiable.
        backend: See `lit_kernels.backend`; "auto" takes the kernels where `unsupported` names no reason against them.

    Returns:
        `[B, T, C]`, contiguous; with `want_map` also `[B, T, S]`, fp32 (fp64 for fp64).

    Raises:
        ValueError: Shapes or dtypes do not fit, or the backend cannot run here.
    """
    _check(query_BTC, key_BSC, value_BSC, heads, mask_BS)
    device, dtype = query_BTC.device, query_BTC.dtype
    width = query_BTC.shape[2] // heads
    case = key_of(query_BTC, heads)
    path = backends.choose(NAME, backend, device, unsupported(key_BSC.shape[1], width, dtype, device), case)
    if path == "reference":
        out, mean = reference.short_key_attention(query_BTC, key_BSC, value_BSC, heads, mask_BS)
        return (out, mean.detach().to(accumulator(dtype))) if want_map else out
    if path == "fallback":
        out = fallback.short_key_attention(query_BTC, key_BSC, value_BSC, heads, mask_BS)
        if not want_map:
            return out
        return out, fallback.short_key_map(query_BTC, key_BSC, heads, mask_BS, accumulator(dtype))
    query, key, value = (_in_rows(x) for x in (query_BTC, key_BSC, value_BSC))
    mask = None if mask_BS is None else reference.additive(mask_BS, accumulator(dtype))
    apply = _Directly.apply if backends.launches_directly(query) else torch.ops.lit_kernels.short_key_attention
    out = apply(query, key, value, mask, heads)
    if not want_map:
        return out
    return out, torch.ops.lit_kernels.short_key_map(query.detach(), key.detach(), mask, heads)


def key_of(query_BTC: Tensor, heads: int) -> Key:
    """What tables know a case by; kernels round the number of keys up, and `heads` are those of all samples."""
    batch, tokens, columns = query_BTC.shape
    sizes = {"head_width": columns // heads, "heads": batch * heads, "tokens": tokens}
    return Key("short_key_attention", query_BTC.dtype, sizes)


def unsupported(keys: int, width: int, dtype: torch.dtype, device: torch.device) -> str:
    """Why the kernels do not take this case; empty where they do."""
    if keys > MAX_KEYS:
        return f"{keys} keys are more than {MAX_KEYS}"
    if width > MAX_WIDTH or width % 8:
        return f"heads {width} wide are not a multiple of 8 up to {MAX_WIDTH}"
    on_tensor_cores = dtype in (torch.bfloat16, torch.float16)
    if not on_tensor_cores and (device.type == "cuda" or dtype not in (torch.float32, torch.float64)):
        return f"{dtype} on {device.type} is not supported"
    return ""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _launch(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    from lit_kernels.short_key_attention import forward

    return forward.launch(query, key, value, mask, heads)


def _launch_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, heads: int
) -> tuple[Tensor, Tensor]:
    from lit_kernels.short_key_attention import backward

    return backward.launch(_in_rows(grad), query, key, value, mask, heads)


@torch.library.custom_op("lit_kernels::short_key_attention", mutates_args=())
def _forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    return _launch(query, key, value, mask, heads)


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("lit_kernels::short_key_map", mutates_args=())
def _map(query: Tensor, key: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    from lit_kernels.short_key_attention import forward

    return forward.launch_map(query, key, mask, heads)


@_map.register_fake
def _(query: Tensor, key: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    return query.new_empty((*query.shape[:2], key.shape[1]), dtype=accumulator(query.dtype))


@torch.library.custom_op("lit_kernels::short_key_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, heads: int
) -> tuple[Tensor, Tensor]:
    return _launch_backward(grad, query, key, value, mask, heads)


@_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, heads: int
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty((2, *key.shape))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *kept, ctx.heads = inputs
    ctx.save_for_backward(*kept)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    direct = backends.launches_directly(grad)
    launch: Any = _launch_backward if direct else torch.ops.lit_kernels.short_key_attention_backward
    d_query, d_key_value = launch(grad, *ctx.saved_tensors, ctx.heads)
    return d_query, d_key_value[0], d_key_value[1], None, None


_forward.register_autograd(_gradients, setup_context=_save)
_Directly = backends.directly(NAME, _launch, _save, _gradients)


def _in_rows(x: Tensor) -> Tensor:
    """The same tensor with a last stride of 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _check(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None) -> None:
    if query.dim() != 3 or key.dim() != 3 or key.shape != value.shape or query.shape[::2] != key.shape[::2]:
        shapes = ", ".join(str(list(x.shape)) for x in (query, key, value))
        raise ValueError(f"{NAME}: Q, K and V are {shapes}, not [B, T, C], [B, S, C] and [B, S, C]")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"{NAME}: Q, K and V are {query.dtype}, {key.dtype} and {value.dtype}; cast them to one dtype")
    if heads < 1 or query.shape[2] % heads:
        raise ValueError(f"{NAME}: {query.shape[2]} columns are not divisible into {heads} heads")
    if mask is None:
        return
    if mask.shape != key.shape[:2]:
        raise ValueError(f"{NAME}: the mask is {list(mask.shape)}, the keys {list(key.shape[:2])}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"{NAME}: the mask is {mask.dtype}; use bool (True: takes part) or a floating dtype (added)")
