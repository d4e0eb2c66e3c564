"""Adapters that form whole changes of weights: each keeps its formula, and what they share stands here."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_personalize.adapters.protocol import Adapter
from lit_personalize.adapters.shadow import WeightShadow
from lit_personalize.backbones.base import Base


class EffectiveWeights(Adapter):
    """One fp32 factor for each changed parameter; the changes are formed once a step (`shadow.py`)."""

    def __init__(
        self, name: str, lr: float | None = None, weight_decay: float | None = None, span: tuple[float, float] = (0, 1)
    ):
        super().__init__(name, lr, weight_decay, span)
        self._shadows: dict[str, WeightShadow] = {}

    @abstractmethod
    def choose(self, base: Base) -> Mapping[str, tuple[nn.Module, str]]:
        """What changes, by the name of its factor: a module and the name of its parameter. Refuses what cannot be."""

    def start(self, name: str) -> Tensor:
        """The factor before training: zeros in the parameter's shape."""
        return torch.zeros(self.frozen(name).shape)

    def changes(self) -> Iterator[tuple[str, Tensor]]:
        """Every change in its parameter's shape, with a gradient to the factors; here these are the changes."""
        for name in self._shadows:
            yield name, self.factor(name)

    def frozen(self, name: str) -> Tensor:
        """W0 of one factor."""
        return self._shadows[name].frozen

    def attach(self, base: Base, seed: int = 0) -> None:
        if self.attached:
            return
        chosen = self.choose(base)
        base.register(self)
        for name, (module, parameter) in chosen.items():
            self._shadows[name] = WeightShadow.of(module, parameter)
            self.add_factor(name, self.start(name))
        self.attached = True
        self.refresh(base.dtype)

    @property
    def elementwise(self) -> bool:
        """Where the factors are the changes themselves."""
        return type(self).changes is EffectiveWeights.changes

    def place(self) -> dict[str, nn.Parameter]:
        """Make each change a parameter of its layer, if it is a factor itself."""
        if not self.elementwise:
            return super().place()
        moved = dict(self.factors.items())
        of_layers = PlacedFactors()
        for (key, factor), shadow in zip(moved.items(), self._shadows.values(), strict=True):
            of_layers.places[key] = shadow.layer, shadow.place(self.name, factor)
        del self.factors
        self.factors: Any = of_layers
        self.refresh(torch.float32)
        return moved

    def refresh(self, dtype: torch.dtype) -> None:
        if isinstance(self.factors, PlacedFactors):
            for shadow in self._shadows.values():
                shadow.placed[self.name] = self.active
            return
        for name, change in self.changes() if self.active else ((name, None) for name in self._shadows):
            self._shadows[name].set(self.name, change)

    def set_active(self, active: bool) -> None:
        if active != self.active:
            self.active = active
            self.refresh(torch.float32)

    def layers(self) -> list[str]:
        return list(self._shadows)


class PlacedFactors(Mapping[str, nn.Parameter]):
    """Factors that are parameters of layers: what they are now, which a sharding strategy replaces."""

    def __init__(self) -> None:
        self.places: dict[str, tuple[nn.Module, str]] = {}

    def __getitem__(self, key: str) -> nn.Parameter:
        module, attribute = self.places[key]
        return module._parameters[attribute]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
