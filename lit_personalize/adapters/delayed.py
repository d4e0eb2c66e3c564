"""Delayed injection (Dravid et al., 2024, arXiv 2406.09413): an edited adapter only from a timestep on.

While noise is high, t > T, the original is applied, which lays out the picture; then the edited one. T of 700 to 1000
suits edits of the whole, 400 to 700 those of details.
"""

from __future__ import annotations

from lit_personalize.adapters.loaded import LoadedAdapter
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.backbones.base import Base
from lit_personalize.errors import UsageError


class Delayed(LoadedAdapter):
    """The original for t > `timestep`, the edited one from there to the end.

    Args:
        original, edited: Changes of the same layers. Words are those of the edited one.
        timestep: T, of the base's noise schedule.

    Raises:
        UsageError: They change different layers, or other parameters than layers.
    """

    def __init__(
        self,
        original: AdapterWeights,
        edited: AdapterWeights,
        timestep: float,
        name: str = "delayed",
        scale: float = 1.0,
    ):
        if set(original.layers()) != set(edited.layers()):
            raise UsageError("delayed injection takes an adapter and its edit, and these change different layers")
        if original.parameters or edited.parameters or original.neurons or edited.neurons:
            raise UsageError("delayed injection takes LoRAs or changes of whole layers, without norms, biases, neurons")
        super().__init__(edited, name, scale)
        self.stages = (original, edited)
        self.timestep = timestep

    def attach(self, base: Base, seed: int = 0) -> None:
        super().attach(base, seed)
        self.at(0.0, float("inf"))

    def at(self, progress: float, timestep: float = 0.0) -> None:
        """Apply the adapter of this timestep."""
        chosen = self.stages[timestep <= self.timestep]
        if self.weights is not chosen:
            self.weights = chosen
            for layer in self.layers():
                self.put(layer)
