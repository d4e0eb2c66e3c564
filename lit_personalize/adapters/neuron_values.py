"""Fine-tuning of concept neurons (Cones; Liu et al., 2023, arXiv 2303.05125): for more than a few concepts together.

The union of several concepts' neurons is shut off, and then these scalars are trained, one value for each: W has the
value where there is a neuron and is W0 everywhere else. Training starts at zero, where the union draws what it draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_personalize.adapters.concept_neurons import placed, shut_change
from lit_personalize.adapters.effective_weights import EffectiveWeights
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.adapters.shadow import layers_of
from lit_personalize.backbones.base import Base
from lit_personalize.errors import DataError, UsageError


def read_neurons(place: Path, base: Base, force: bool = False) -> AdapterWeights:
    """Concept neurons of a file, or of the one such file in a folder or run.

    Raises:
        DataError: See `export.loading.read_adapter`; or there is no such file, or more than one.
        UsageError: The file holds something else.
    """
    from lit_personalize.export.loading import exports_of, read_adapter

    folder = exports_of(place)
    files = sorted(folder.glob("*.neurons.safetensors")) if folder.is_dir() else [folder]
    if len(files) != 1:
        raise DataError(f"{folder} holds {len(files)} files *.neurons.safetensors; name one file")
    weights = read_adapter(files, base, force)
    if not weights.neurons:
        raise UsageError(f"{files[0]} holds no concept neurons; name a *.neurons.safetensors file")
    return weights


class NeuronValues(EffectiveWeights):
    """One trained value `[n]` for each of a layer's n concept neurons.

    Args:
        neurons: Their file, or a run or folder with one: of ConceptNeurons, or of `litp merge neurons`. Values that
            it holds are where training starts.
    """

    def __init__(
        self,
        neurons: str,
        name: str = "neuron_values",
        lr: float | None = None,
        weight_decay: float | None = None,
    ):
        super().__init__(name, lr, weight_decay)
        self.neurons = neurons
        self._given = AdapterWeights()

    def choose(self, base: Base) -> dict[str, tuple[nn.Module, str]]:
        self._given = read_neurons(Path(self.neurons), base)
        known = layers_of(base.components())
        return {layer: (module, "weight") for layer, module in known.items() if layer in self._given.neurons}

    def start(self, name: str) -> Tensor:
        return self._given.values.get(name, torch.zeros(len(self._given.neurons[name])))

    def changes(self) -> Iterator[tuple[str, Tensor]]:
        """What stands in place of the weights that are shut off."""
        for layer in self._shadows:
            yield layer, placed(self.factor(layer), self._given.neurons[layer], self.frozen(layer))

    def refresh(self, dtype: torch.dtype) -> None:
        for layer, shadow in self._shadows.items():
            shadow.shut(self.name, self._given.neurons[layer] if self.active else None)
        super().refresh(dtype)

    def delta(self, layer: str) -> Tensor:
        return shut_change(self.frozen(layer), self._given.neurons[layer], self.factor(layer))

    def export_weights(self) -> AdapterWeights:
        values = {layer: self.factor(layer).detach().float().cpu().clone() for layer in self._shadows}
        frozen = {layer: self.frozen(layer).detach().cpu() for layer in values}
        dense = {layer: shut_change(frozen[layer], self._given.neurons[layer], own) for layer, own in values.items()}
        return AdapterWeights(dense=dense, neurons=dict(self._given.neurons), values=values)
