"""How an adapter's factors lie in one row of numbers: Weights2Weights' order (Dravid et al., 2024, arXiv 2406.09413).

A row is the concatenation of all LoRA factors in the alphabetical order of their PEFT keys: layer by layer, A before
B. Legend: `D` numbers in a row, `R` rank, `A [R, in]`, `B [out, R]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lit_personalize.adapters.protocol import AdapterWeights, LowRank
from lit_personalize.errors import DataError


@dataclass(frozen=True)
class Slice:
    """Where one factor lies in a row."""

    layer: str
    part: str
    """"A" or "B"."""
    shape: tuple[int, ...]
    start: int

    @property
    def name(self) -> str:
        """As adapters name their factors: `unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q:A`."""
        return f"{self.layer}:{self.part}"

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        return self.start + self.size


@dataclass(frozen=True)
class Layout:
    """The slices of a row, and every layer's alpha; s = alpha / R is not in the numbers."""

    slices: tuple[Slice, ...]
    alphas: Mapping[str, float]

    @classmethod
    def of(cls, weights: AdapterWeights) -> Layout:
        """The layout of a LoRA on linear layers.

        Raises:
            DataError: The adapter holds something else.
        """
        others = [kind for kind, values in vars(weights).items() if values and kind != "low_rank"]
        if others or not weights.low_rank:
            raise DataError(f"a row holds LoRA factors, and this adapter has {', '.join(others) or 'none'}")
        shapes = {}
        for layer, factors in weights.low_rank.items():
            shapes[layer] = (tuple(factors.down.shape), tuple(factors.up.shape))
        return cls.from_shapes(shapes, {layer: factors.alpha for layer, factors in weights.low_rank.items()})

    @classmethod
    def from_shapes(
        cls, shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]], alphas: Mapping[str, float]
    ) -> Layout:
        """By layer the shapes of A and B."""
        found: list[Slice] = []
        for layer in sorted(shapes, key=lambda name: f"{name}.lora"):
            for part, shape in zip("AB", shapes[layer], strict=True):
                found.append(Slice(layer, part, tuple(shape), found[-1].stop if found else 0))
        return cls(tuple(found), {layer: float(alphas[layer]) for layer in shapes})

    @cached_property
    def width(self) -> int:
        """D."""
        return self.slices[-1].stop

    @cached_property
    def layers(self) -> list[str]:
        return [s.layer for s in self.slices if s.part == "A"]

    @property
    def ranks(self) -> set[int]:
        return {s.shape[0] for s in self.slices if s.part == "A"}

    def flatten(self, weights: AdapterWeights) -> Tensor:
        """An adapter as a row `[D]`, fp32.

        Raises:
            DataError: It has other layers, ranks or alphas.
        """
        other = Layout.of(weights)
        if other != self:
            raise DataError(f"the adapter {self.difference(other)}")
        low = weights.low_rank
        parts = [low[s.layer].down if s.part == "A" else low[s.layer].up for s in self.slices]
        return torch.cat([part.detach().float().cpu().flatten() for part in parts])

    def unflatten(self, row: Tensor) -> AdapterWeights:
        """A row `[D]` as an adapter."""
        parts = self.views(row.detach().float().cpu())
        return AdapterWeights(
            low_rank={
                layer: LowRank(parts[f"{layer}:A"].clone(), parts[f"{layer}:B"].clone(), self.alphas[layer])
                for layer in self.layers
            }
        )

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """Every factor of rows `[..., D]`, `[..., R, in]` or `[..., out, R]`, by name; views, with a gradient."""
        parts = rows.split([s.size for s in self.slices], dim=-1)
        return {s.name: part.unflatten(-1, s.shape) for s, part in zip(self.slices, parts, strict=True)}

    def difference(self, other: Layout) -> str:
        """In what another layout differs from this one, in words."""
        if self.layers != other.layers:
            return f"changes {len(other.layers)} layers, not the same {len(self.layers)}"
        if self.ranks != other.ranks:
            return f"has rank {sorted(other.ranks)}, not {sorted(self.ranks)}"
        if self.slices != other.slices:
            return "has layers of other sizes"
        return "has other alphas"

    def to_json(self) -> dict[str, Any]:
        return {
            "slices": [[s.layer, s.part, list(s.shape), s.start] for s in self.slices],
            "alphas": dict(self.alphas),
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Layout:
        slices = tuple(Slice(layer, part, tuple(shape), start) for layer, part, shape, start in told["slices"])
        return cls(slices, {layer: float(alpha) for layer, alpha in told["alphas"].items()})
