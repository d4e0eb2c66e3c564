"""An adapter read from files, for sampling: frozen low-rank and dense changes, and token rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from lit_personalize.adapters.concept_neurons import placed
from lit_personalize.adapters.protocol import Adapter, AdapterWeights
from lit_personalize.adapters.shadow import WeightShadow, all_parameters, layers_of, matrix_shape
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.token_rows import row_names
from lit_personalize.errors import DataError, UsageError


class LoadedAdapter(Adapter):
    """Weights from `export.loading.read_adapter`, applied with a strength.

    Args:
        scale: Multiplies every ΔW, also those of text encoders; token rows are used as they are.
        blocks: Part of a layer's name -> strength; multiplies the ΔW of layers that have it, beside `scale`. A part is
            whole words between dots (`up_blocks.1`), where `*` stands for any letters of one word. Of several that
            match a layer the last counts.

    Raises:
        UsageError: A part is in the name of no changed layer.
    """

    def __init__(
        self,
        weights: AdapterWeights,
        name: str = "loaded",
        scale: float = 1.0,
        blocks: Mapping[str, float] | None = None,
    ):
        super().__init__(name)
        self.weights = weights
        self.scale = scale
        self.strengths = strengths_of([*weights.layers(), *weights.parameters], blocks or {}, name)
        self._shadows: dict[str, WeightShadow] = {}
        self._others: dict[str, WeightShadow] = {}

    def attach(self, base: Base, seed: int = 0) -> None:
        """Apply to a base.

        Raises:
            DataError: A layer does not exist in the base or has another shape.
        """
        if self.attached:
            return
        components = base.components()
        known = layers_of(components)
        for layer in self.layers():
            if layer not in known:
                raise DataError(f"adapter {self.name!r} changes {layer}, which base {base.source} does not have")
            shape, own = tuple(self.delta(layer).shape), matrix_shape(known[layer])
            if shape != own:
                raise DataError(
                    f"adapter {self.name!r} was made for another base: {layer} is {shape}, base {base.source} has {own}"
                )
        others = {f"{c}.{p}": m for c, module in components.items() for p, m in all_parameters(module).items()}
        for name, change in self.weights.parameters.items():
            if name not in others:
                raise DataError(f"adapter {self.name!r} changes {name}, which base {base.source} does not have")
            module, attribute = others[name]
            if change.shape != getattr(module, attribute).shape:
                raise DataError(f"adapter {self.name!r} was made for another base: {name} is {tuple(change.shape)}")
        for token, rows in self.weights.tokens.items():
            widths = [added.width for added in base.added_rows]
            if [r.shape[1] for r in rows] != widths:
                raise DataError(f"token {token} has widths {[r.shape[1] for r in rows]}, base {base.source} {widths}")
        base.register(self)
        self._shadows = {layer: WeightShadow.of(known[layer]) for layer in self.layers()}
        self._others = {name: WeightShadow.of(*others[name]) for name in self.weights.parameters}
        for token, rows in self.weights.tokens.items():
            names = row_names(token, len(rows[0]))
            for i, tokenizer in enumerate(base.tokenizers):
                if tokenizer.add_tokens(names) != len(names):
                    raise DataError(f"token {token} is already in the vocabulary of base {base.source}")
                base.added_rows[i].add(partial(self._rows, token, i))
            base.vectors_of_token[token] = len(rows[0])
        self.attached = True
        self.refresh(base.dtype)

    def _rows(self, token: str, encoder: int) -> Tensor:
        return self.weights.tokens[token][encoder]

    def refresh(self, dtype: torch.dtype) -> None:
        for layer in self._shadows:
            self.put(layer)
        for name, shadow in self._others.items():
            strength = self.scale * self.strengths.get(name, 1.0)
            change = strength * self.weights.parameters[name].to(shadow.frozen.device) if self.active else None
            shadow.set(self.name, change)

    def put(self, layer: str) -> None:
        """Put the layer's present ΔW in place, or take it away while inactive."""
        shadow = self._shadows[layer]
        if not self.active:
            shadow.set(self.name, None)
            shadow.shut(self.name, None)
            return
        strength = self.scale * self.strengths.get(layer, 1.0)
        if layer in self.weights.neurons:  # a weight that two adapters shut off is zero, not subtracted twice
            shadow.shut(self.name, self.weights.neurons[layer], strength)
            if layer in self.weights.values:
                values = strength * self.weights.values[layer]
                shadow.set(self.name, placed(values, self.weights.neurons[layer], shadow.frozen))
        else:
            delta = strength * self.delta(layer).to(shadow.frozen.device)
            shadow.set(self.name, delta.reshape(shadow.frozen.shape))

    def set_active(self, active: bool) -> None:
        if active != self.active:
            self.active = active
            self.refresh(torch.float32)

    def layers(self) -> list[str]:
        return self.weights.layers()

    def delta(self, layer: str) -> Tensor:
        return self.weights.delta(layer)

    def export_weights(self) -> AdapterWeights:
        return self.weights


def strengths_of(layers: Iterable[str], blocks: Mapping[str, float], name: str) -> dict[str, float]:
    """Layer -> the strength of the last part that its name has; layers without one are left out.

    Raises:
        UsageError: A part is in no layer's name.
    """
    found: dict[str, float] = {}
    known = list(layers)
    for part, strength in blocks.items():
        words = re.escape(part).replace(r"\*", "[^.]*")
        pattern = re.compile(rf"(?:^|\.){words}(?:\.|$)")
        matched = [layer for layer in known if pattern.search(layer)]
        if not part or not matched:
            raise UsageError(
                f"adapter {name!r}: no layer that it changes has {part!r} in its name; "
                f"it changes {', '.join(blocks_of(known)) or 'tokens only'}"
            )
        found |= dict.fromkeys(matched, strength)
    return found


def blocks_of(layers: Iterable[str]) -> list[str]:
    """The blocks that layers lie in, once each: `unet.up_blocks.1`, `unet.mid_block`, `text_encoder`."""
    short = re.compile(r"^(unet\.(?:\w+_blocks\.\d+|\w+)|[^.]+)")
    return list(dict.fromkeys(match[0] for layer in layers if (match := short.match(layer))))
