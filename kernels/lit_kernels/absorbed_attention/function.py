"""`absorb` and `absorbed_attention`: a cross-attention layer without its projections, and the choice of a backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_kernels import backend as backends
from lit_kernels import dispatch
from lit_kernels.absorbed_attention import fallback, reference
from lit_kernels.table_files import Key

NAME = "absorbed_attention"
MAX_KEYS = 128


class Absorbed(NamedTuple):
    """A layer and its text, for each of P prompts."""

    keys_PNSC: Tensor
    """G_n = K_n W_q,n / √H."""
    values_PNSC: Tensor
    """U_n = V_n W_o,nᵀ, with the output bias in n = 0."""


def absorb(
    key_PSI: Tensor,
    value_PSI: Tensor,
    query_weight: Tensor,
    out_weight: Tensor,
    heads: int,
    out_bias: Tensor | None = None,
) -> Absorbed:
    """Multiply a layer's query and output projections into its K and V: once for a prompt, layer and set of weights.

    Products are taken in fp32 at least and rounded once. The output bias costs nothing later: a head's probabilities
    sum to 1, so it is added to every row of U of the first head.

    Args:
        key_PSI: K of P prompts, all N heads side by side: I = N·H.
        value_PSI: V, likewise.
        query_weight: W_q `[I, C]`, adapters merged into it, or `[P, I, C]`, each prompt's own. Any dtype.
        out_weight: W_o `[C, I]` or `[P, C, I]`.
        heads: N.
        out_bias: `[C]` or `[P, C]`.

    Returns:
        G and U, `[P, N, S, C]`, in K's dtype.

    Raises:
        ValueError: Shapes do not fit.
        RuntimeError: A gradient is wanted.
    """
    _refuse_gradients(key=key_PSI, value=value_PSI, W_q=query_weight, W_o=out_weight, bias=out_bias)
    _check_layer(key_PSI, value_PSI, query_weight, out_weight, heads)
    dtype = torch.promote_types(key_PSI.dtype, torch.float32)
    key, value = (states.to(dtype).unflatten(-1, (heads, -1)).transpose(1, 2) for states in (key_PSI, value_PSI))
    query_weight_NHC = query_weight.to(dtype).unflatten(-2, (heads, -1))
    out_weight_NHC = out_weight.to(dtype).mT.unflatten(-2, (heads, -1))
    keys = key @ query_weight_NHC * key.shape[-1] ** -0.5
    values = value @ out_weight_NHC
    if out_bias is not None:
        values[:, 0] += out_bias.to(dtype)[..., None, :]
    return Absorbed(keys.to(key_PSI.dtype), values.to(key_PSI.dtype))


def absorbed_attention(x_BTC: Tensor, absorbed: Absorbed, backend: backends.Backend = "auto") -> Tensor:
    """y = Σ_n softmax(x G_nᵀ) U_n: what the absorbed layer gives, without gradients.

    Args:
        x_BTC: fp64, fp32, fp16 or bf16. With P prompts, B = P·b samples: the first b have the first prompt, and so on.
        absorbed: From `absorb`, in x's dtype.
        backend: See `lit_kernels.backend`. "auto" takes the kernel for fp16 and bf16: products in fp32 and fp64 are
            left to torch.

    Returns:
        `[B, T, C]`.

    Raises:
        ValueError: Shapes or dtypes do not fit, samples cannot be shared out equally, or the backend cannot run here.
        RuntimeError: A gradient is wanted.
    """
    keys, values = absorbed
    _refuse_gradients(x=x_BTC, G=keys, U=values)
    _check(x_BTC, keys, values)
    samples, tokens, width = x_BTC.shape
    x = x_BTC.reshape(len(keys), samples // len(keys) * tokens, width)
    if backend == "reference":
        y = reference.absorbed_attention(x, keys, values)
    else:
        unsupported = _unsupported(x, keys)
        if backend == "auto" and x.dtype not in (torch.float16, torch.bfloat16):
            unsupported = unsupported or f"torch multiplies {x.dtype} as fast"
        prompts, heads, key_count, _ = keys.shape
        dispatch.noted(key_of(x.dtype, prompts, x.shape[1], heads, key_count, width))
        if backends.choose(NAME, backend, x.device, unsupported) == "fallback":
            y = fallback.absorbed_attention(x, keys, values)
        else:
            x = x if x.stride(2) == 1 else x.contiguous()
            y = torch.ops.lit_kernels.absorbed_probabilities(x, keys) @ values.flatten(1, 2)
    return y.view(samples, tokens, values.shape[-1])


def key_of(dtype: torch.dtype, prompts: int, rows: int, heads: int, keys: int, width: int) -> Key:
    """What tables know a case by: keys as kernels round them up, the rows of a prompt, the heads of all prompts.

    A table's "fallback" is the ordinary layer: whoever absorbs one asks before (`lit_kernels.absorbed_attention.
    layers`).
    """
    sizes = {"keys": 80 if keys <= 80 else MAX_KEYS, "rows": rows, "heads": prompts * heads, "width": width}
    return Key(NAME, dtype, sizes)


@torch.library.custom_op("lit_kernels::absorbed_probabilities", mutates_args=())
def _probabilities(x: Tensor, keys: Tensor) -> Tensor:
    from lit_kernels.absorbed_attention import forward

    return forward.launch(x, keys.contiguous())


@_probabilities.register_fake
def _(x: Tensor, keys: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], keys.shape[1] * keys.shape[2]))


def _refuse_gradients(**tensors: Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(f"{NAME} has no gradients and {name} requires one; call it under torch.no_grad()")


def _unsupported(x: Tensor, keys: Tensor) -> str:
    if keys.shape[2] > MAX_KEYS:
        return f"{keys.shape[2]} keys are more than {MAX_KEYS}"
    return "" if x.shape[1] and keys.shape[2] else "there are no rows or no keys"


def _check(x: Tensor, keys: Tensor, values: Tensor) -> None:
    if x.ndim != 3 or keys.ndim != 4 or keys.shape[3] != x.shape[2] or values.shape[:3] != keys.shape[:3]:
        raise ValueError(f"{NAME}: G {list(keys.shape)} and U {list(values.shape)} do not fit x {list(x.shape)}")
    if not x.dtype == keys.dtype == values.dtype:
        raise ValueError(f"{NAME}: x is {x.dtype}, G {keys.dtype} and U {values.dtype}; they must be alike")
    if not len(keys) or len(x) % len(keys):
        raise ValueError(f"{NAME}: {len(x)} samples cannot be shared out equally to {len(keys)} prompts")


def _check_layer(key: Tensor, value: Tensor, query_weight: Tensor, out_weight: Tensor, heads: int) -> None:
    inner = key.shape[-1]
    if key.ndim != 3 or value.shape != key.shape or inner % heads:
        shapes = f"K {list(key.shape)} and V {list(value.shape)}"
        raise ValueError(f"{NAME}: {shapes} are not [P, S, I] with I a multiple of {heads} heads")
    for name, weight, axis in (("W_q", query_weight, -2), ("W_o", out_weight, -1)):
        if weight.ndim not in (2, 3) or weight.shape[axis] != inner or weight.shape[:-2] not in ((), key.shape[:1]):
            raise ValueError(f"{NAME}: {name} {list(weight.shape)} does not fit K {list(key.shape)}")
