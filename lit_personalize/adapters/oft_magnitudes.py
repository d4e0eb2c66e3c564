"""OFT's second stage, magnitude fitting (Qiu et al., 2023, arXiv 2306.07280): W = diag(m)·W0·Rᵀ, R as it was learned.

Rotations leave the lengths of the rows of W0 as they are. Once R is found, one number m_i for each output, 1 at the
start, fits its row's length: angles between rows stay (for m_i > 0).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from lit_personalize.adapters.effective_weights import EffectiveWeights
from lit_personalize.adapters.loaded import LoadedAdapter
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.adapters.shadow import layers_of
from lit_personalize.backbones.base import Base
from lit_personalize.errors import UsageError


class OFTMagnitudes(EffectiveWeights):
    """The lengths of the rows of layers that OFT has rotated; the factor of a layer is m `[out]`.

    Args:
        rotations: What OFT exported with the format `peft`, for the same base: `runs/NAME/exports/peft_oft/unet`.
            Tokens beside it are used as they are.
    """

    cannot_export: ClassVar[Mapping[str, str]] = {
        "peft": "PEFT's OFT holds rotations without lengths; use pipeline, delta, or diffusers for a LoRA near to it"
    }

    def __init__(
        self,
        rotations: str,
        name: str = "oft_magnitudes",
        lr: float | None = None,
        weight_decay: float | None = None,
    ):
        super().__init__(name, lr, weight_decay)
        self.rotations = rotations
        self._given = AdapterWeights()

    def choose(self, base: Base) -> dict[str, tuple[nn.Module, str]]:
        from lit_personalize.export.loading import exports_of, read_adapter

        self._given = read_adapter(exports_of(Path(self.rotations)), base)
        if not self._given.rotations or set(self._given.layers()) != set(self._given.rotations):
            raise UsageError(
                f"{self.rotations} holds no rotations of OFT; name its PEFT folder, runs/NAME/exports/peft_oft/unet"
            )
        known = layers_of(base.components())
        return {layer: (module, "weight") for layer, module in known.items() if layer in self._given.rotations}

    def attach(self, base: Base, seed: int = 0) -> None:
        if self.attached:
            return
        super().attach(base, seed)
        if self._given.tokens:
            LoadedAdapter(AdapterWeights(tokens=self._given.tokens), f"words of {self.name}").attach(base)

    def start(self, name: str) -> Tensor:
        return torch.ones(len(self.frozen(name)))

    def changes(self) -> Iterator[tuple[str, Tensor]]:
        for layer in self._shadows:
            yield layer, self.delta(layer)

    def delta(self, layer: str) -> Tensor:
        """m·(W0 + ΔW of the rotation) - W0; with m = 1 the rotation's own change to the bit."""
        return scaled_change(self.frozen(layer).float(), self._given.dense[layer], self.factor(layer))

    @torch.no_grad()
    def export_weights(self) -> AdapterWeights:
        dense = {
            layer: scaled_change(
                self.frozen(layer).cpu().double(), self._given.dense[layer].double(), self.factor(layer).cpu().double()
            ).float()
            for layer in self._shadows
        }
        return AdapterWeights(dense=dense, tokens=self._given.tokens)


def scaled_change(weight: Tensor, change: Tensor, magnitude: Tensor) -> Tensor:
    """diag(m)·(W0 + ΔW) - W0 `[out, in]` of W0, ΔW `[out, in]` and m `[out]`."""
    m = magnitude[:, None]
    return (m - 1) * weight + m * change.to(weight.device)
