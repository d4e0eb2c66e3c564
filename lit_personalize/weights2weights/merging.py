"""Between identities: weighted sums of points, and a LoRA from outside of the space beside one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_personalize.adapters.protocol import AdapterWeights, LowRank
from lit_personalize.errors import UsageError
from lit_personalize.weights2weights.points import Point
from lit_personalize.weights2weights.subspace import Subspace


def combine(space: Subspace, points: Sequence[Point], weights: Sequence[float]) -> Tensor:
    """mean + Σ w_i (θ_i - mean), `[D]`: coefficients add up linearly, and so does what lies outside of the space.

    Raises:
        UsageError: There are not as many weights as points.
    """
    if len(points) != len(weights):
        raise UsageError(f"{len(points)} adapters and {len(weights)} weights: give one for each")
    row = space.mean.clone()
    for point, weight in zip(points, weights, strict=True):
        row += weight * (point.row - space.mean)
    return row


def beside(weights: AdapterWeights, other: AdapterWeights, strength: float = 1.0) -> AdapterWeights:
    """The exact sum with another LoRA, their ranks side by side; of a style, for example, that the space has not.

    Raises:
        UsageError: The other one is not low-rank alone.
    """
    if others := [kind for kind, values in vars(other).items() if values and kind not in ("low_rank", "tokens")]:
        raise UsageError(f"what is added is no LoRA: it has {', '.join(others)}; export it as one first")
    low_rank = dict(weights.low_rank)
    for layer, factors in other.low_rank.items():
        added = LowRank(factors.down, factors.up * strength, factors.alpha)
        if layer in low_rank:
            low_rank[layer] = low_rank[layer].shaped(_shape(added)).concatenate(added)
        else:
            low_rank[layer] = added
    return AdapterWeights(low_rank=low_rank, tokens=dict(other.tokens))


def _shape(factors: LowRank) -> torch.Size:
    return torch.Size([factors.up.shape[0], *factors.down.shape[1:]])
