"""ΔW at a smaller rank, and the share of its energy that is left.

The energy of a change is its squared Frobenius norm. The best change of rank k keeps the k largest singular values
(Eckart & Young, 1936) and with them the share Σ_{i<=k} σ_i² / Σ σ_i² of the energy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_personalize.adapters.protocol import LowRank
from lit_personalize.errors import UsageError
from lit_personalize.export.factorize import smallest_rank

ROUNDING = 1e-6
"""Relative Frobenius error that counts as none: singular values below it are rounding of fp32 files."""


@dataclass(frozen=True)
class Cut:
    """Where to truncate.

    Raises:
        UsageError: A rank below 1, an energy outside of (0, 1], or both.
    """

    rank: int | None = None
    """Largest rank of a layer."""
    energy: float | None = None
    """Smallest share of a layer's energy to keep."""

    def __post_init__(self) -> None:
        if self.rank is not None and self.energy is not None:
            raise UsageError("rank and energy both say where to cut; give one of them")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"rank must be at least 1, not {self.rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"energy must be a share above 0 and at most 1, such as 0.99, not {self.energy:g}")

    def __bool__(self) -> bool:
        return self.rank is not None or self.energy is not None

    def keep(self, singular: Tensor) -> int:
        """How many of the singular values (descending) to keep; at least 1. None asked: all but rounding."""
        if self.energy is not None:
            return smallest_rank(singular, max(ROUNDING, (1 - self.energy) ** 0.5))
        known = smallest_rank(singular, ROUNDING)
        return known if self.rank is None else min(self.rank, known)


@dataclass
class Factors:
    """ΔW = up · down in fp64: `up [out, R]`, `down [R, in]`; a convolution's `in` counts channels times taps."""

    up: Tensor
    down: Tensor
    energy: float = 0.0
    """‖ΔW‖² of the exact change."""
    kept: float = 0.0
    """‖up · down‖², at most `energy`."""

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def measured(self) -> Factors:
        """The same factors with their energy: ‖B A‖² = <BᵀB, AAᵀ>, without the product."""
        self.energy = self.kept = float(((self.up.T @ self.up) * (self.down @ self.down.T)).sum().clamp(min=0))
        return self

    def delta(self) -> Tensor:
        """ΔW `[out, in]`."""
        return self.up @ self.down

    def low_rank(self, shape: torch.Size) -> LowRank:
        """As fp32 factors with alpha = rank of a layer whose weight has this shape."""
        down = self.down.float().cpu().reshape(-1, *shape[1:]).contiguous()
        up = self.up.float().cpu().reshape(shape[0], -1, *[1] * (len(shape) - 2)).contiguous()
        return LowRank(down, up, float(self.rank))


def truncate(factors: Factors, cut: Cut) -> Factors:
    """The best change of smaller rank, from QR of both factors and the SVD of an `[R, R]` matrix.

    With up = Q_b R_b and downᵀ = Q_a R_a, the SVD of up · down is that of R_b R_aᵀ between orthonormal bases; no
    `[out, in]` matrix is formed.
    """
    basis_out, inner_out = torch.linalg.qr(factors.up)
    basis_in, inner_in = torch.linalg.qr(factors.down.T)
    u, singular, vh = torch.linalg.svd(inner_out @ inner_in.T, full_matrices=False)
    keep = cut.keep(singular)
    root = singular[:keep].sqrt()
    energy = singular.square()
    return Factors(
        basis_out @ (u[:, :keep] * root), (root[:, None] * vh[:keep]) @ basis_in.T,
        float(energy.sum()), float(energy[:keep].sum()),
    )  # fmt: skip


def truncate_dense(delta: Tensor, cut: Cut) -> Factors:
    """The best change of smaller rank of a matrix `[out, in]`, from the eigenvectors U of its smaller Gram matrix.

    The result is the projection U Uᵀ ΔW (or ΔW U Uᵀ): right whatever the rounding of the eigenvectors, and several
    times faster than the SVD of a wide matrix.
    """
    matrix = delta.double()
    tall = matrix.shape[0] > matrix.shape[1]
    matrix = matrix.T if tall else matrix
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    singular = values.flip(0).clamp(min=0).sqrt()
    keep = cut.keep(singular)
    basis = vectors.flip(1)[:, :keep]
    inner = basis.T @ matrix
    # Both factors get the root of the singular values: neither overflows where the client holds them in fp16.
    root = singular[:keep].sqrt().clamp(min=1e-150)
    left, right = basis * root, inner / root[:, None]
    energy, kept = float(matrix.square().sum()), float(inner.square().sum())
    return Factors(right.T, left.T, energy, kept) if tall else Factors(left, right, energy, kept)
