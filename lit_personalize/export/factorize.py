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


def rank_of_share(singular: Tensor, share: float, power: int) -> int:
    """Fewest singular values whose Σ σ^power reaches `share` of the whole; at least 1.

    Power 2 is the energy; power 1 the nuclear norm, which Custom Diffusion's compression counts
    (Kumari et al., 2022, appendix: "top 60 %").
    """
    mass = singular.double() ** power
    total = float(mass.sum())
    if total == 0:
        return 1
    reached = mass.cumsum(0) / total >= share - 1e-12
    return int(reached.long().argmax()) + 1 if bool(reached.any()) else len(singular)


def factorize(
    delta: Tensor,
    max_error: float = 1e-3,
    rank: int | None = None,
    energy: float | None = None,
    nuclear: float | None = None,
) -> tuple[LowRank, float]:
    """Factor ΔW `[out, in]` in fp64 into the smallest rank within `max_error`, or as asked.

    Args:
        max_error: Relative Frobenius error; 0 keeps every singular value, exact but for fp32 rounding.
        rank: Fixed rank instead.
        energy: Share of Σ σ² to keep instead, in (0, 1].
        nuclear: Share of Σ σ to keep instead, in (0, 1].

    Returns:
        The factors (alpha = rank, so s = 1) and the relative Frobenius error that they have.

    Raises:
        ValueError: More than one of `rank`, `energy`, `nuclear`, or one outside its range.
    """
    asked = {"rank": rank, "energy": energy, "nuclear": nuclear}
    given = {name: value for name, value in asked.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"choose one of {', '.join(given)}")
    if max_error < 0 or (rank is not None and rank < 1):
        raise ValueError(f"max_error must not be negative and rank at least 1, not {max_error} and {rank}")
    if wrong := [name for name in ("energy", "nuclear") if name in given and not 0 < float(given[name]) <= 1]:
        raise ValueError(f"{wrong[0]} must be in (0, 1], not {given[wrong[0]]}")
    u, singular, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    if rank is not None:
        keep = min(rank, len(singular))
    elif energy is not None:
        keep = rank_of_share(singular, energy, 2)
    elif nuclear is not None:
        keep = rank_of_share(singular, nuclear, 1)
    else:
        keep = smallest_rank(singular, max_error)
    root = singular[:keep].sqrt()
    up, down = (u[:, :keep] * root).float(), (root[:, None] * vh[:keep]).float()
    norm = float(delta.double().norm())
    error = float((up.double() @ down.double() - delta.double()).norm()) / norm if norm else 0.0
    return LowRank(down.contiguous(), up.contiguous(), float(keep)), error
