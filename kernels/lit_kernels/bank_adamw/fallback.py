"""The same in plain torch on whole tensors, without a loop over adapters and without waiting for the GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def bank_adamw(
    master_GP: Tensor,
    m_GP: Tensor,
    v_GP: Tensor,
    grad_GP: Tensor,
    lr_G: Tensor,
    weight_decay_G: Tensor,
    step_G: Tensor,
    max_norm_G: Tensor,
    betas: tuple[float, float],
    eps: float,
    shadow_GP: Tensor | None = None,
) -> Tensor:
    """As `reference.bank_adamw`."""
    dtype = master_GP.dtype
    grad = grad_GP.to(dtype)
    norm = grad.square().sum(dim=1).sqrt()
    applied = norm.isfinite()
    step_G += applied
    lr, step = lr_G.double(), step_G.double()  # 1 - 0.999 has 4 digits in fp32
    decay, rate = 1 - lr * weight_decay_G, lr / (1 - betas[0] ** step)
    root = (1 - betas[1] ** step).sqrt()
    grad = grad * _column((max_norm_G.to(dtype) / (norm + 1e-6)).clamp(max=1), dtype)
    m = torch.lerp(m_GP, grad, 1 - betas[0])
    v = (betas[1] * v_GP).addcmul_(grad, grad, value=1 - betas[1])
    change = m / (v.sqrt() / _column(root, dtype) + eps) * _column(rate, dtype)
    master = master_GP * _column(decay, dtype) - change
    for old, new in ((master_GP, master), (m_GP, m), (v_GP, v), (shadow_GP, master)):
        if old is not None:
            old.copy_(torch.where(applied[:, None], new.to(old.dtype), old))
    return ~applied


def _column(values_G: Tensor, dtype: torch.dtype) -> Tensor:
    return values_G.to(dtype)[:, None]
