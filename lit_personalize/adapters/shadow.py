"""Effective weights: a linear or convolution layer that reads W0 + Σ ΔW while its own parameter stays W0.

The sum stands in the module's `__dict__`, which Python looks up before registered parameters: the
base's `parameters()` and `state_dict()` stay stock, and switching an adapter is a pointer move.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class WeightShadow:
    """The deltas on one layer, by adapter name."""

    def __init__(self, linear: nn.Linear | nn.Conv2d):
        self.linear = linear
        self.deltas: dict[str, Tensor] = {}

    @classmethod
    def of(cls, linear: nn.Linear | nn.Conv2d) -> WeightShadow:
        """The layer's shadow, made at the first call."""
        if "_weight_shadow" not in linear.__dict__:
            linear.__dict__["_weight_shadow"] = cls(linear)
        return cast(WeightShadow, linear.__dict__["_weight_shadow"])

    @property
    def frozen(self) -> Tensor:
        """W0, whatever `linear.weight` shows."""
        return cast(Tensor, self.linear._parameters["weight"])

    def set(self, name: str, delta: Tensor | None) -> None:
        """Put, replace or (None) remove one adapter's ΔW, in the weight's shape; the sum is formed in fp32."""
        self.deltas.pop(name, None)
        if delta is not None:
            self.deltas[name] = delta
        self.linear.__dict__.pop("weight", None)
        if self.deltas:
            total = self.frozen
            for part in self.deltas.values():
                total = total + part
            self.linear.__dict__["weight"] = total.to(self.frozen.dtype)


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers by stock path, in module order; layers that PEFT wrapped count under their own path."""
    named = ((path.removesuffix(".base_layer"), m) for path, m in module.named_modules())
    return {path: m for path, m in named if isinstance(m, nn.Linear) and ".lora_" not in path}


def weight_layers(module: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Like `linear_layers`, with convolutions: what adapter files of other trainers may change."""
    named = ((path.removesuffix(".base_layer"), m) for path, m in module.named_modules())
    return {path: m for path, m in named if isinstance(m, nn.Linear | nn.Conv2d) and ".lora_" not in path}


def matrix_shape(layer: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    """`[out, in]` of a layer's weight; a convolution's `in` counts channels times taps."""
    weight = cast(Tensor, layer._parameters["weight"])
    return weight.shape[0], weight[0].numel()


def device_of(linear: nn.Linear | nn.Conv2d) -> torch.device:
    """Where the layer's own weight W0 lies."""
    return cast(Tensor, linear._parameters["weight"]).device
