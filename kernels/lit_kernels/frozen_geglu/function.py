"""`frozen_geglu`: the operator with its gradient, registered with torch, and the choice of a backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_kernels import backend as backends
from lit_kernels.frozen_geglu import reference
from lit_kernels.table_files import Key

NAME = "frozen_geglu"


def frozen_geglu(projected: Tensor, backend: backends.Backend = "auto") -> Tensor:
    """h · GELU(g) of [h | g], with the exact GELU: diffusers' GEGLU behind its projection.

    Differentiable. The kernels keep the input alone for the backward pass, and leave it as it is.

    Args:
        projected: [h | g], `[..., 2F]`, fp64, fp32, fp16 or bf16.
        backend: See `lit_kernels.backend`. "fallback" and "reference" are the same two launches.

    Returns:
        `[..., F]`, in the input's dtype.

    Raises:
        ValueError: The last axis cannot be halved, a dtype without gradients, or the backend cannot run here.
    """
    if projected.ndim == 0 or projected.shape[-1] % 2:
        raise ValueError(f"{NAME}: the last axis of {list(projected.shape)} does not hold two halves")
    if not projected.is_floating_point():
        raise ValueError(f"{NAME}: {projected.dtype} has no gradient; use fp64, fp32, fp16 or bf16")
    unsupported = "" if projected.numel() else "there are no elements"
    rows = projected.reshape(-1, projected.shape[-1])
    if backends.choose(NAME, backend, projected.device, unsupported, key_of(rows)) != "triton":
        return reference.frozen_geglu(projected)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    apply = _Directly.apply if backends.launches_directly(rows) else torch.ops.lit_kernels.frozen_geglu
    return apply(rows).view(*projected.shape[:-1], -1)


def _launch(projected: Tensor) -> Tensor:
    from lit_kernels.frozen_geglu import forward

    return forward.launch(projected)


def _launch_backward(projected: Tensor, grad: Tensor) -> Tensor:
    from lit_kernels.frozen_geglu import backward

    return backward.launch(projected, grad.contiguous())


def key_of(projected_MF: Tensor) -> Key:
    """What tables know a case by."""
    return Key(NAME, projected_MF.dtype, {"rows": len(projected_MF), "width": projected_MF.shape[1] // 2})


@torch.library.custom_op("lit_kernels::frozen_geglu", mutates_args=())
def _forward(projected: Tensor) -> Tensor:
    return _launch(projected)


@_forward.register_fake
def _(projected: Tensor) -> Tensor:
    return projected.new_empty((projected.shape[0], projected.shape[1] // 2))  # len() would fix the size


@torch.library.custom_op("lit_kernels::frozen_geglu_backward", mutates_args=())
def _backward(projected: Tensor, grad: Tensor) -> Tensor:
    return _launch_backward(projected, grad)


@_backward.register_fake
def _(projected: Tensor, grad: Tensor) -> Tensor:
    return projected.new_empty(projected.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, grad: Tensor) -> Tensor:
    (projected,) = ctx.saved_tensors
    direct = backends.launches_directly(projected)
    launch = _launch_backward if direct else torch.ops.lit_kernels.frozen_geglu_backward
    return launch(projected, grad)  # type: ignore[no-any-return]


_forward.register_autograd(_gradient, setup_context=_save)
_Directly = backends.directly(NAME, _launch, _save, _gradient)
