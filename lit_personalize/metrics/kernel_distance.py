"""Maximum mean discrepancy between feature sets (Gretton et al., 2012), and KID (Binkowski et al., 2018)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Callable[[Tensor, Tensor], Tensor]


def polynomial(degree: int) -> Kernel:
    """k(x, y) = (xᵀy / d + 1)^degree."""
    return lambda x, y: (x @ y.T / x.shape[1] + 1) ** degree


def gaussian(sigma: float) -> Kernel:
    """k(x, y) = exp(-‖x - y‖² / 2σ²) on normalised features (CMMD, Jayasumana et al., 2024)."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
        return torch.exp(-torch.cdist(x, y).square() / (2 * sigma**2))

    return kernel


KERNELS: dict[str, Kernel] = {
    "kid": polynomial(3),
    "poly2": polynomial(2),
    "cmmd": gaussian(10.0),
    "linear": lambda x, y: x @ y.T,
}

SMALLEST_TO_HALVE = 4
"""Samples that give two for each side of an unbiased estimate."""


def mmd2(x: Tensor, y: Tensor, kernel: str = "kid", biased: bool = False) -> float:
    """Squared MMD of `[m, d]` and `[n, d]` in fp64; m and n may differ.

    Unbiased (Gretton et al., 2012, eq. 3): Σ_{i≠j} k(x_i, x_j) / m(m-1) + the same for y - 2 mean k(x, y). It may be
    negative for few samples. Biased (eq. 5) uses all pairs and is never negative. torchmetrics computes the same KID
    for sets of one size only, and no Gaussian kernel.

    Raises:
        ValueError: Fewer than two samples for the unbiased estimate, or an unknown kernel.
    """
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}; use one of {', '.join(KERNELS)}")
    k = KERNELS[kernel]
    x, y = x.double(), y.double()
    m, n = len(x), len(y)
    kxx, kyy, kxy = k(x, x), k(y, y), k(x, y)
    if biased:
        return float(kxx.mean() + kyy.mean() - 2 * kxy.mean())
    if min(m, n) < 2:
        raise ValueError(f"the unbiased estimate needs two samples on each side, not {m} and {n}")
    own_x = (kxx.sum() - kxx.diagonal().sum()) / (m * (m - 1))
    own_y = (kyy.sum() - kyy.diagonal().sum()) / (n * (n - 1))
    return float(own_x + own_y - 2 * kxy.mean())


def halves_mmd2(x: Tensor, kernel: str = "kid") -> float | None:
    """Unbiased `mmd2` of every second row of `[n, d]` with the others: one distribution against itself.

    None where n < `SMALLEST_TO_HALVE`.
    """
    return mmd2(x[::2], x[1::2], kernel) if len(x) >= SMALLEST_TO_HALVE else None
