"""The union of several concepts' neurons (Cones; Liu et al., 2023, arXiv 2303.05125, sec. 3.3), as one adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.errors import UsageError


@dataclass(frozen=True)
class Union:
    """United neurons, and how many they are."""

    weights: AdapterWeights
    counts: list[int]
    """Neurons of each adapter."""
    shared: int
    """Neurons that more than one adapter has."""

    @property
    def united(self) -> int:
        """Neurons of the union."""
        return count(self.weights)


def count(weights: AdapterWeights) -> int:
    """Neurons of all layers."""
    return sum(map(len, weights.neurons.values()))


def unite(adapters: Sequence[AdapterWeights], names: Sequence[str]) -> Union:
    """Shut off what any of the adapters shuts off; the order does not matter.

    Raises:
        UsageError: Fewer than two adapters, or one has values of its own, which are trained for its own union.
    """
    if len(adapters) < 2:
        raise UsageError("name two files of concept neurons or more; one is its own union")
    for weights, name in zip(adapters, names, strict=True):
        if weights.values:
            raise UsageError(
                f"{name} holds trained values of its neurons, which fit its own union alone: "
                "unite the masks from before that training, then train the values of the new union"
            )
    shared = 0
    for layer in dict.fromkeys(layer for weights in adapters for layer in weights.neurons):
        own = [weights.neurons[layer] for weights in adapters if layer in weights.neurons]
        shared += int((torch.cat(own).unique(return_counts=True)[1] > 1).sum())
    return Union(reduce(AdapterWeights.merge, adapters), [count(weights) for weights in adapters], shared)
