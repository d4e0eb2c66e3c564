"""Dense ΔW as a product of two thin matrices, by the singular value decomposition (Eckart & Young, 1936)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_personalize.adapters.protocol import LowRank
from lit_personalize.errors import UsageError

SLACK = 1 + 1e-12
"""On what may be left out: 1 - 0.8 is rounded to less than 0.2."""


@dataclass(frozen=True)
class Truncation:
    """How many singular values σ_1 >= σ_2 >= ... of a layer are kept.

    Args:
        max_error: The fewest whose relative Frobenius error is no larger; 0 keeps all, exact but for fp32 rounding.
        max_rank: Never more than these, whatever the rule asks; None is no bound.
        energy: Instead of `max_error`: the fewest with this share of Σ σ².
        nuclear: Instead of `max_error`: the fewest with this share of Σ σ. Custom Diffusion compresses to 0.6 of it
            (Kumari et al., 2022, arXiv 2212.04488, appendix); its code keeps one value fewer, at times none.

    Raises:
        UsageError: A number out of range, or both shares.
    """

    max_error: float = 1e-3
    max_rank: int | None = None
    energy: float | None = None
    nuclear: float | None = None

    def __post_init__(self) -> None:
        if not self.max_error >= 0:
            raise UsageError(f"max_error must be 0 (exact) or positive, not {self.max_error}")
        if self.max_rank is not None and self.max_rank < 1:
            raise UsageError(f"max_rank must be at least 1 (or null for no bound), not {self.max_rank}")
        for name, share in (("energy", self.energy), ("nuclear", self.nuclear)):
            if share is not None and not 0 < share <= 1:
                raise UsageError(f"{name} must be a share above 0 and at most 1, such as 0.9, not {share:g}")
        if self.energy is not None and self.nuclear is not None:
            raise UsageError("energy and nuclear both say how much of a layer is kept; give one of them")

    def rank(self, singular: Tensor) -> int:
        """How many of the singular values (descending) are kept; at least 1."""
        if self.energy is not None:
            found = smallest_rank(singular, ((1 - self.energy) * SLACK) ** 0.5)
        elif self.nuclear is not None:
            found = nuclear_rank(singular, self.nuclear)
        else:
            found = smallest_rank(singular, self.max_error)
        return min(found, self.max_rank or found)

    def __str__(self) -> str:
        shares = {"energy": self.energy, "nuclear": self.nuclear}
        rule = next((f"{n} >= {v:g}" for n, v in shares.items() if v is not None), f"error <= {self.max_error:g}")
        return rule if self.max_rank is None else f"{rule}, rank <= {self.max_rank}"


@dataclass(frozen=True)
class Kept:
    """What is left of one layer's ΔW."""

    rank: int
    error: float
    """Relative Frobenius error of the fp32 factors."""
    energy: float
    """Σ σ² of the kept, as a share of all."""
    nuclear: float
    """Σ σ of the kept, as a share of all."""
    numbers: tuple[int, int]
    """Of the factors, and of the matrix."""


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


def nuclear_rank(singular: Tensor, share: float) -> int:
    """Fewest singular values whose sum is at least `share` of the sum of all; at least 1."""
    values = singular.double()
    tail = values.flip(0).cumsum(0).flip(0)
    return max(1, int((tail > (1 - share) * SLACK * tail[0]).sum()))


def factorize(delta: Tensor, how: Truncation | None = None) -> tuple[LowRank, Kept]:
    """Factor ΔW `[out, in]` in fp64 and keep as many singular values as `how` says.

    Returns:
        The factors (alpha = rank, so s = 1) and what they hold of the change.
    """
    u, singular, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    keep = (how or Truncation()).rank(singular)
    root = singular[:keep].sqrt()
    up, down = (u[:, :keep] * root).float(), (root[:, None] * vh[:keep]).float()
    norm = float(delta.double().norm())
    error = float((up.double() @ down.double() - delta.double()).norm()) / norm if norm else 0.0
    energy, nuclear = (float(v[:keep].sum() / v.sum()) if norm else 1.0 for v in (singular.square(), singular))
    sizes = (up.numel() + down.numel(), delta.numel())
    return LowRank(down.contiguous(), up.contiguous(), float(keep)), Kept(keep, error, energy, nuclear, sizes)


def summary(kept: Sequence[Kept], how: Truncation) -> str:
    """What was kept of all layers, in one clause; "" of none."""
    if not kept:
        return ""
    ranks = sorted(k.rank for k in kept)
    few, all_ = (sum(k.numbers[i] for k in kept) for i in (0, 1))
    least = {name: min(getattr(k, name) for k in kept) for name in ("energy", "nuclear")}
    return (
        f"{len(kept)} dense layers at ranks {ranks[0]} to {ranks[-1]} ({how}): of each at least {least['energy']:.1%} "
        f"of the energy and {least['nuclear']:.1%} of the singular values' sum, in {few / all_:.1%} of the numbers"
    )
