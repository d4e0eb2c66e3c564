"""Dense ΔW as a product of two thin matrices, by the singular value decomposition (Eckart & Young, 1936)."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_personalize.adapters.protocol import LowRank


def smallest_rank(singular: Tensor, max_error: float) -> int:
    """Fewest singular values whose truncation keeps the relative Frobenius error within `max_error`; at least 1."""
    energy = singular.double().square()
    total = float(energy.sum())
    if total == 0:
        return 1
    # error² of keeping k values = Σ_{i>k} σ_i² / Σ σ_i²
    tail = energy.flip(0).cumsum(0).flip(0) / total
    above = tail > max_error**2
    return max(1, int(above.sum()))


def factorize(delta: Tensor, max_error: float = 1e-3, max_rank: int | None = None) -> tuple[LowRank, float]:
    """Factor ΔW `[out, in]` in fp64 into the smallest rank within `max_error`.

    Args:
        max_error: Relative Frobenius error; 0 keeps every singular value, exact but for fp32 rounding.
        max_rank: Keeps no more singular values than these, whatever the error; None is no bound.

    Returns:
        The factors (alpha = rank, so s = 1) and the relative Frobenius error that they have.

    Raises:
        ValueError: `max_error` is negative, or `max_rank` below 1.
    """
    if max_error < 0:
        raise ValueError(f"max_error must not be negative, got {max_error}")
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"max_rank must be at least 1, got {max_rank}")
    u, singular, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    keep = min(smallest_rank(singular, max_error), max_rank or len(singular))
    root = singular[:keep].sqrt()
    up, down = (u[:, :keep] * root).float(), (root[:, None] * vh[:keep]).float()
    norm = float(delta.double().norm())
    error = float((up.double() @ down.double() - delta.double()).norm()) / norm if norm else 0.0
    return LowRank(down.contiguous(), up.contiguous(), float(keep)), error
