"""`bank_adamw`: the operator, registered with torch as one that changes its arguments, and the choice of a backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_kernels import backend as backends
from lit_kernels.bank_adamw import fallback, reference
from lit_kernels.table_files import Key

NAME = "bank_adamw"


@torch.no_grad()
def bank_adamw(
    master_GP: Tensor,
    m_GP: Tensor,
    v_GP: Tensor,
    grad_GP: Tensor,
    lr_G: Tensor,
    weight_decay_G: Tensor,
    step_G: Tensor,
    max_norm_G: Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    shadow_GP: Tensor | None = None,
    backend: backends.Backend = "auto",
) -> Tensor:
    """One step of AdamW, in place, for each of G adapters as if it were alone: what `torch.optim.AdamW` does after
    `clip_grad_norm_` over that adapter's parameters.

    An adapter whose gradient's norm is not finite is skipped whole: weights, moments, shadow and step count stay as
    they are. In fp32 that is also a norm above 1.8e19, whose square is not finite. No adapter changes a bit of another.

    Args:
        master_GP: Weights, fp32 or fp64; changed.
        m_GP: First moment, in the weights' dtype; changed. Zeros at the start.
        v_GP: Second moment, likewise.
        grad_GP: Gradients, of any dtype; they stay as they are, clipped or not.
        lr_G: Learning rates.
        weight_decay_G: Decoupled weight decays; a step takes lr · weight decay of the weights away.
        step_G: int64, the steps made so far; advanced by 1 where a step is made.
        max_norm_G: Largest norm of a gradient; inf for no clipping.
        betas: Decay rates of the moments, the same for all, at least 0 and below 1.
        eps: Added to the root of the second moment.
        shadow_GP: A copy of the weights in another dtype, which is kept up to date.
        backend: See `lit_kernels.backend`. The kernels want weights, moments and shadow contiguous.

    Returns:
        bool `[G]`: whose step was skipped.

    Raises:
        ValueError: Shapes or dtypes do not fit, or the backend cannot run here.
    """
    tensors = {"m": m_GP, "v": v_GP, "grad": grad_GP} | ({} if shadow_GP is None else {"shadow": shadow_GP})
    rows = {"lr": lr_G, "weight_decay": weight_decay_G, "step": step_G, "max_norm": max_norm_G}
    _check(master_GP, tensors, rows, betas)
    changed = [tensor.detach() for tensor in (master_GP, m_GP, v_GP)]
    shadow = None if shadow_GP is None else shadow_GP.detach()
    arguments: list[Any] = [*changed, grad_GP.detach(), *rows.values(), betas, eps, shadow]
    if backend == "reference":
        return reference.bank_adamw(*arguments)
    unsupported = ""
    if not all(tensor.is_contiguous() for tensor in (*changed, *(() if shadow is None else (shadow,)))):
        unsupported = "weights, moments or shadow are not contiguous"
    if not master_GP.numel():
        unsupported = "there are no parameters"
    adapters, parameters = master_GP.shape
    key = Key(NAME, master_GP.dtype, {"adapters": adapters, "parameters": parameters})
    if backends.choose(NAME, backend, master_GP.device, unsupported, key) == "fallback":
        return fallback.bank_adamw(*arguments)
    return torch.ops.lit_kernels.bank_adamw(*changed, grad_GP.detach(), *rows.values(), shadow, *betas, eps)


@torch.library.custom_op("lit_kernels::bank_adamw", mutates_args=("master", "m", "v", "step", "shadow"))
def _update(
    master: Tensor, m: Tensor, v: Tensor, grad: Tensor, lr: Tensor, weight_decay: Tensor, step: Tensor,
    max_norm: Tensor, shadow: Tensor | None, beta1: float, beta2: float, eps: float,
) -> Tensor:  # fmt: skip
    from lit_kernels.bank_adamw import forward

    applied = forward.launch(
        master, m, v, grad.contiguous(), lr.contiguous(), weight_decay.contiguous(), step.contiguous(),
        max_norm.contiguous(), (beta1, beta2), eps, shadow,
    )  # fmt: skip
    step += applied
    return ~applied


@_update.register_fake
def _(
    master: Tensor, m: Tensor, v: Tensor, grad: Tensor, lr: Tensor, weight_decay: Tensor, step: Tensor,
    max_norm: Tensor, shadow: Tensor | None, beta1: float, beta2: float, eps: float,
) -> Tensor:  # fmt: skip
    return torch.empty(len(master), dtype=torch.bool, device=master.device)


def _check(master: Tensor, tensors: dict[str, Tensor], rows: dict[str, Tensor], betas: tuple[float, float]) -> None:
    if master.ndim != 2 or master.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{NAME}: weights must be [G, P] in fp32 or fp64, not {list(master.shape)} in {master.dtype}")
    for name, tensor in tensors.items():
        if tensor.shape != master.shape:
            raise ValueError(f"{NAME}: {name} is {list(tensor.shape)}, the weights {list(master.shape)}")
        if name in ("m", "v") and tensor.dtype != master.dtype:
            raise ValueError(f"{NAME}: {name} is {tensor.dtype}, the weights {master.dtype}")
    for name, row in rows.items():
        if row.shape != master.shape[:1]:
            raise ValueError(f"{NAME}: {name} is {list(row.shape)}, but there are {len(master)} adapters")
    if rows["step"].dtype != torch.int64:
        raise ValueError(f"{NAME}: step is {rows['step'].dtype}, it must be int64")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{NAME}: betas must be at least 0 and below 1, not {betas}")
