"""AdamW for every adapter of a bank on its own, by its definition, in any dtype up to fp64.

Legend: `G` adapters, `P` parameters of one adapter.
"""

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
    """One step in place; bool `[G]`, true where an adapter was skipped because its gradient's norm is not finite.

    Clipping by the norm: Pascanu et al., 2013, arXiv 1211.5063, algorithm 1, with torch's 1e-6. AdamW: Loshchilov and
    Hutter, 2019, arXiv 1711.05101, algorithm 2, with lr · weight decay for its λ, as torch has it.
    """
    skipped = torch.zeros(len(master_GP), dtype=torch.bool, device=master_GP.device)
    for g, (theta, m, v, grad) in enumerate(zip(master_GP, m_GP, v_GP, grad_GP, strict=True)):
        norm = grad.to(theta.dtype).square().sum().sqrt()
        if not norm.isfinite():
            skipped[g] = True
            continue
        grad = grad.to(theta.dtype) * (max_norm_G[g].to(theta.dtype) / (norm + 1e-6)).clamp(max=1)
        step_G[g] += 1
        lr, step = float(lr_G[g]), int(step_G[g])
        theta.mul_(1 - lr * float(weight_decay_G[g]))
        m.mul_(betas[0]).add_(grad, alpha=1 - betas[0])
        v.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
        m_hat_scale, v_hat_scale = 1 / (1 - betas[0] ** step), 1 / (1 - betas[1] ** step)
        theta.sub_(lr * m_hat_scale * m / ((v * v_hat_scale).sqrt() + eps))
        if shadow_GP is not None:
            shadow_GP[g].copy_(theta)
    return skipped
