"""New identities: coefficients drawn from the corpus's own distribution (Dravid et al., 2024, sec. 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_personalize import randomness
from lit_personalize.errors import UsageError
from lit_personalize.weights2weights.subspace import Subspace

COMPONENTS = 1000
"""The paper's number of components for sampling and editing."""


def draw(space: Subspace, count: int, seed: int = 0, spread: float = 1.0, components: int | None = None) -> Tensor:
    """β `[count, m]` with β_k ~ N(μ_k, (f σ_k)²) for the first m components; the others stay 0.

    An identity is a function of the seed and its number: not of how many are drawn.

    Args:
        spread: f; below 1 identities are nearer to the mean.
        components: m; by default 1,000, or as many as there are.

    Raises:
        UsageError: There are not that many components, or nothing is asked for.
    """
    most = len(space)
    m = min(COMPONENTS, most) if components is None else components
    if not 1 <= m <= most:
        raise UsageError(f"the space has {most} components: draw from 1 to {most} of them, not {m}")
    if count < 1 or spread < 0:
        raise UsageError(f"draw at least one identity with a spread of 0 or more, not {count} with {spread:g}")
    if len(space.coefficients) < 2:
        raise UsageError("the space has no two adapters of which it knows the coefficients: fit it on more")
    known = space.coefficients[:, :m].double()
    normal = torch.cat([randomness.normal((m,), seed, "w2w-identity", 0, [number]) for number in range(count)])
    return (known.mean(0) + spread * known.std(0) * normal.double()).float()
