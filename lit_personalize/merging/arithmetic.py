"""Merge adapters layer by layer: which method makes what of a layer, and how much of it the written rank keeps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import copysign, sqrt
from typing import Literal

import torch
from torch import Tensor

from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.errors import DataError, UsageError
from lit_personalize.merging import elementwise
from lit_personalize.merging.sources import Source
from lit_personalize.merging.subspace import orthogonalize
from lit_personalize.merging.sums import concatenate, weighted_sum
from lit_personalize.merging.truncation import ROUNDING, Cut, Factors, truncate, truncate_dense

log = logging.getLogger(__name__)

Mode = Literal["linear", "concat", "svd", "ties", "dare", "magnitude", "orthogonal", "magmax"]


@dataclass(frozen=True)
class MergeOptions:
    """How to merge; options that a mode does not know are an error where they are not at their default."""

    rank: int | None = None
    """Largest rank of a layer."""
    energy: float | None = None
    """Smallest share of every layer's energy to keep."""
    density: float | None = None
    """Share of elements that TIES, DARE and magnitude pruning keep; by default 0.2 (TIES' paper) or 0.5."""
    sign: elementwise.Sign = "total"
    """How TIES elects."""
    elect: bool = False
    """DARE with TIES' election of signs in place of the sum."""
    on: Literal["change", "factors"] = "change"
    """What an element is one of: of ΔW (the papers), or of A and B (PEFT)."""
    seed: int = 0
    """Of DARE's draws."""
    protect: float = 1.0
    """Share of the energy whose inputs `orthogonal` keeps free for earlier adapters."""

    @property
    def cut(self) -> Cut:
        return Cut(self.rank, self.energy)


@dataclass
class Energy:
    """Squared Frobenius norms of the exact merge and of what was kept, over all layers."""

    exact: float = 0.0
    kept: float = 0.0
    layers: dict[str, float] = field(default_factory=dict)
    """Share kept by layer."""

    def add(self, layer: str, factors: Factors) -> None:
        self.exact += factors.energy
        self.kept += factors.kept
        self.layers[layer] = min(1.0, factors.kept / factors.energy) if factors.energy else 1.0

    @property
    def share(self) -> float:
        return min(1.0, self.kept / self.exact) if self.exact else 1.0

    @property
    def worst(self) -> tuple[str, float]:
        """The layer that keeps the smallest share."""
        return min(self.layers.items(), key=lambda item: item[1], default=("", 1.0))


@dataclass
class Merged:
    """The merged adapter, and what is known about it."""

    weights: AdapterWeights
    energy: Energy
    left: list[float] | None = None
    """Of `orthogonal`: share of each adapter's energy that the projection left."""


@dataclass
class Layer:
    """One layer in several adapters."""

    name: str
    sources: list[Source]
    numbers: list[int]
    """Places of these adapters in the whole list."""

    def parts(self) -> list[Factors]:
        return [source.factors(self.name) for source in self.sources]

    def deltas(self) -> list[Tensor]:
        return [source.delta(self.name) for source in self.sources]

    def ranks(self) -> list[int]:
        return [source.rank(self.name) for source in self.sources]


def combine(mode: Mode, sources: Sequence[Source], shapes: Mapping[str, torch.Size], options: MergeOptions) -> Merged:
    """Merge the layers of all adapters; a layer that only some change is merged from those.

    Args:
        shapes: Of the base's weights, by layer.

    Raises:
        UsageError: Too few adapters, or an option that does not fit the mode.
        DataError: Nothing is left of the changes.
    """
    check(mode, len(sources), options)
    found = Merged(AdapterWeights(), Energy())
    before, after = [0.0] * len(sources), [0.0] * len(sources)
    changed = [set(source.layers()) for source in sources]
    for name in shapes:  # the base's order, whatever the files'
        numbers = [n for n, layers in enumerate(changed) if name in layers]
        if not numbers:
            continue
        layer = Layer(name, [sources[n] for n in numbers], numbers)
        if mode == "orthogonal":
            parts = layer.parts()
            for n, part in zip(numbers, parts, strict=True):
                before[n] += part.measured().energy
            projected = orthogonalize(parts, options.protect)
            for n, part in zip(numbers, projected, strict=True):
                after[n] += part.energy
            merged = weighted_sum(projected, options.cut)
        else:
            merged = METHODS[mode](layer, options)
        if not merged.kept > ROUNDING**2 * max(part.measured().energy for part in layer.parts()):
            continue  # changes that cancel, or were never trained
        found.energy.add(name, merged)
        found.weights.low_rank[name] = merged.low_rank(shapes[name])
    if any(changed) and not found.weights.low_rank:
        raise DataError("nothing is left of these adapters: their changes are zero or cancel each other")
    if mode == "orthogonal":
        found.left = [a / b if b else 1.0 for a, b in zip(after, before, strict=True)]
    return found


# ---- what each mode makes of a layer ------------------------------------------------------------------


def _linear(layer: Layer, options: MergeOptions) -> Factors:
    return weighted_sum(layer.parts(), options.cut)


def _concat(layer: Layer, options: MergeOptions) -> Factors:
    return concatenate(layer.parts())


def _svd(layer: Layer, options: MergeOptions) -> Factors:
    return weighted_sum(layer.parts(), options.cut or Cut(rank=max(layer.ranks())))


def _elementwise(merge: Callable[[Sequence[Tensor], Layer, str, MergeOptions], Tensor]) -> Callable[..., Factors]:
    """A method on tensors as one on layers: on ΔW, or on the factors A and B by themselves."""

    def merged(layer: Layer, options: MergeOptions) -> Factors:
        if options.on == "change":
            delta = merge(layer.deltas(), layer, "", options)
            return truncate_dense(delta, options.cut or Cut(rank=sum(layer.ranks())))
        downs, ups = zip(*[_balanced(source, layer.name) for source in layer.sources], strict=True)
        if len({len(down) for down in downs}) > 1:
            raise UsageError(
                f"{layer.name} has ranks {', '.join(str(len(d)) for d in downs)}: factors of different ranks have no "
                "common elements; merge on the change (--on change)"
            )
        factors = Factors(merge(ups, layer, ":B", options), merge(downs, layer, ":A", options)).measured()
        return truncate(factors, options.cut) if options.cut else factors

    return merged


def _balanced(source: Source, name: str) -> tuple[Tensor, Tensor]:
    """A and B with the root of strength and scale in each, the sign in A, as PEFT weights them."""
    if name in source.weights.dense:
        raise UsageError(f"{source.name} changes {name} without factors; merge on the change (--on change)")
    low = source.weights.low_rank[name]
    scale = source.scale(name) * low.alpha / low.rank
    root = sqrt(abs(scale))
    return copysign(root, scale) * low.down.flatten(1).double(), root * low.up.flatten(1).double()


def _ties(tensors: Sequence[Tensor], layer: Layer, part: str, options: MergeOptions) -> Tensor:
    return elementwise.ties(tensors, density_of("ties", options), options.sign)


def _dare(tensors: Sequence[Tensor], layer: Layer, part: str, options: MergeOptions) -> Tensor:
    draws = elementwise.Draws(options.seed, layer.name + part)
    density = density_of("dare", options)
    if options.elect:
        return elementwise.dare_ties(tensors, layer.numbers, density, draws, options.sign)
    return torch.stack(elementwise.dare(tensors, layer.numbers, density, draws)).sum(0)


def _magnitude(tensors: Sequence[Tensor], layer: Layer, part: str, options: MergeOptions) -> Tensor:
    return elementwise.magnitude(tensors, density_of("magnitude", options))


def _magmax(tensors: Sequence[Tensor], layer: Layer, part: str, options: MergeOptions) -> Tensor:
    return elementwise.magmax(tensors)


METHODS: dict[str, Callable[[Layer, MergeOptions], Factors]] = {
    "linear": _linear, "concat": _concat, "svd": _svd, "ties": _elementwise(_ties), "dare": _elementwise(_dare),
    "magnitude": _elementwise(_magnitude), "magmax": _elementwise(_magmax),
}  # fmt: skip
MODES = (*METHODS, "orthogonal")
DENSITY = {"ties": 0.2, "dare": 0.5, "magnitude": 0.5}


def density_of(mode: str, options: MergeOptions) -> float:
    return DENSITY[mode] if options.density is None else options.density


def check(mode: str, count: int, options: MergeOptions) -> None:
    """Refuse what a mode cannot do, before anything is read."""
    if mode not in MODES:
        raise UsageError(f"unknown way to merge {mode!r}; use {', '.join(MODES)}")
    if count < 1:
        raise UsageError(f"nothing to merge: name two adapters or more, as in litp merge {mode} FIRST SECOND@0.8")
    if count == 1 and mode != "svd":
        raise UsageError(
            "one adapter is nothing to merge: name two or more; litp merge svd also truncates a single one"
        )
    _ = options.cut  # checks itself
    if mode == "concat" and options.cut:
        raise UsageError("concat keeps every rank; litp merge linear or svd truncates")
    if mode not in DENSITY and options.density is not None:
        raise UsageError(f"{mode} keeps every element: density belongs to {', '.join(DENSITY)}")
    if options.density is not None and not 0 < options.density <= 1:
        raise UsageError(f"density must be a share above 0 and at most 1, not {options.density:g}")
    if options.on == "factors" and mode not in DENSITY:
        raise UsageError(f"{mode} has no form on factors; {', '.join(DENSITY)} have")
    if options.on not in ("change", "factors"):
        raise UsageError(f"merge on change or on factors, not on {options.on!r}")
    if options.sign not in ("total", "frequency"):
        raise UsageError(f"signs are elected by total or frequency, not by {options.sign!r}")
    if not 0 < options.protect <= 1:
        raise UsageError(f"protect must be a share above 0 and at most 1, not {options.protect:g}")
