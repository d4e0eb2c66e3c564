"""Files of concept neurons: which weights of a layer are zero, or have values of their own; for our reader alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from lit_personalize.adapters.concept_neurons import shut_change
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.errors import DataError
from lit_personalize.export import keys

INDEX = ".idx"
"""Ends the keys of indices, ascending flat int32."""
VALUE = ".val"
"""Ends the keys of fp32 values, one for each index; a layer without them has zeros there."""


def sparse_neurons(weights: AdapterWeights) -> dict[str, Tensor]:
    """`{<portable layer>.idx: int32 [n], <portable layer>.val: fp32 [n]}`."""
    indices = {f"{keys.portable(layer)}{INDEX}": own for layer, own in weights.neurons.items()}
    return indices | {f"{keys.portable(layer)}{VALUE}": own for layer, own in weights.values.items()}


def parse_neurons(
    tensors: Mapping[str, Tensor], layer_of: Callable[[str], str], weights: Mapping[str, Tensor], path: Path
) -> AdapterWeights:
    """Indices and values by layer, and the change that they make of this base's weights.

    Args:
        layer_of: Our layer of a name in the file.
        weights: W0 of every layer of the base.

    Raises:
        DataError: Indices that do not ascend or lie outside the weight; values without them, or of another number.
    """
    found = AdapterWeights()
    named = {part: {layer_of(k.removesuffix(part)): t for k, t in tensors.items() if k.endswith(part)}
             for part in (INDEX, VALUE)}  # fmt: skip
    for layer, indices in named[INDEX].items():
        weight = weights[layer].detach().cpu()
        if indices.ndim != 1 or not bool((indices.diff() > 0).all()) or indices[0] < 0 or indices[-1] >= weight.numel():
            raise DataError(
                f"{path}: {keys.portable(layer)}{INDEX} must hold ascending indices of a weight {tuple(weight.shape)}, "
                "once each"
            )
        found.neurons[layer] = indices
    for layer, values in named[VALUE].items():
        if layer not in found.neurons or values.shape != found.neurons[layer].shape:
            raise DataError(f"{path}: {keys.portable(layer)}{VALUE} must hold one value for each index of the layer")
        found.values[layer] = values.float()
    for layer, indices in found.neurons.items():
        weight = weights[layer].detach().cpu()
        found.dense[layer] = shut_change(weight, indices, found.values.get(layer)).flatten(1)
    return found


def share_of(weights: AdapterWeights) -> float:
    """Neurons as a share of the weights of the layers that have any."""
    total = sum(weights.dense[layer].numel() for layer in weights.neurons)
    return sum(map(len, weights.neurons.values())) / total
