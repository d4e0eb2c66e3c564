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


def factorize(delta: Tensor, max_error: float = 1e-3, rank: int | None = None) -> tuple[LowRank, float]:
    """Factor ΔW `[out, in]` into the smallest rank within `max_error`, or into `rank`.

    Returns:
        The factors (alpha = rank, so s = 1) and the relative Frobenius error that they have.
    """
    u, singular, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    keep = smallest_rank(singular, max_error) if rank is None else min(rank, len(singular))
    root = singular[:keep].sqrt()
    up, down = (u[:, :keep] * root).float(), (root[:, None] * vh[:keep]).float()
    norm = float(delta.double().norm())
    error = float((up.double() @ down.double() - delta.double()).norm()) / norm if norm else 0.0
    return LowRank(down.contiguous(), up.contiguous(), float(keep)), error
