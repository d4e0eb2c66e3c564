"""Effective weights: a layer that reads W0 + Σ ΔW while its own parameter stays W0.

The sum stands in the module's `__dict__`, which Python looks up before registered parameters: the
base's `parameters()` and `state_dict()` stay stock, and switching an adapter is a pointer move.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn


class WeightShadow:
    """The deltas on one parameter of a layer, by adapter name."""

    def __init__(self, layer: nn.Module, parameter: str = "weight"):
        self.layer = layer
        self.parameter = parameter
        self.deltas: dict[str, Tensor] = {}
        self.placed: dict[str, bool] = {}
        """Adapters whose ΔW is a parameter of the layer, and whether they are on."""
        self.shut_off: dict[str, tuple[Tensor, float]] = {}
        """By adapter: flat indices of weights that are zero, and how far (1 is all the way)."""

    @classmethod
    def of(cls, layer: nn.Module, parameter: str = "weight") -> WeightShadow:
        """The parameter's shadow, made at the first call."""
        key = f"_{parameter}_shadow"
        if key not in layer.__dict__:
            layer.__dict__[key] = cls(layer, parameter)
        return cast(WeightShadow, layer.__dict__[key])

    @property
    def frozen(self) -> Tensor:
        """W0, whatever the layer's attribute shows."""
        return cast(Tensor, self.layer._parameters[self.parameter])

    def set(self, name: str, delta: Tensor | None) -> None:
        """Put, replace or (None) remove one adapter's ΔW, in the weight's shape; the sum is formed in fp32."""
        self.deltas.pop(name, None)
        if delta is not None:
            self.deltas[name] = delta
        self._show()

    def place(self, name: str, delta: nn.Parameter) -> str:
        """Make one adapter's ΔW a parameter of the layer; the sum is formed whenever the layer runs.

        So a strategy that gathers a layer's weights only while it runs gathers and frees ΔW with them.

        Returns:
            The attribute that holds it.
        """
        self.set(name, None)
        if not self.placed:
            self._wrap_forward()
        self.placed[name] = True
        self.layer.register_parameter(attribute := self._attribute(name), delta)
        return attribute

    def _wrap_forward(self) -> None:
        """Form the sum inside the layer's own forward: behind the hooks by which a strategy gathers its weights.

        Not in a hook of its own, which could come before those; DeepSpeed then frees ΔW before it has its gradient.
        """
        inner = self.layer.forward

        @functools.wraps(inner)
        def forward(*inputs: Any, **named: Any) -> Any:
            parts = self.layer._parameters
            self.deltas |= {n: cast(Tensor, parts[self._attribute(n)]) for n, on in self.placed.items() if on}
            self._show()
            try:
                return inner(*inputs, **named)
            finally:
                for name in self.placed:
                    self.deltas.pop(name, None)
                self.layer.__dict__.pop(self.parameter, None)

        self.layer.forward = forward  # type: ignore[method-assign]

    def _attribute(self, name: str) -> str:
        return f"{self.parameter}_change_{name}".replace(".", "_")

    def shut(self, name: str, indices: Tensor | None, share: float = 1.0) -> None:
        """Scale the weights of W0 at flat `indices` by 1 - `share`, or (None) no more; for two adapters, the lower."""
        self.shut_off.pop(name, None)
        if indices is not None:
            self.shut_off[name] = (indices, share)
        self._show()

    def _show(self) -> None:
        self.layer.__dict__.pop(self.parameter, None)
        if self.deltas or self.shut_off:
            total = self.frozen
            if self.shut_off:
                kept = torch.ones(total.numel(), device=total.device)
                for indices, share in self.shut_off.values():
                    index = indices.to(total.device, torch.int64)
                    kept[index] = kept[index].clamp(max=1 - share)
                total = total * kept.reshape(total.shape)
            for part in self.deltas.values():
                total = total + part
            self.layer.__dict__[self.parameter] = total.to(self.frozen.dtype)


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers by stock path, in module order; layers that PEFT wrapped count under their own path."""
    named = ((path.removesuffix(".base_layer"), m) for path, m in module.named_modules())
    return {path: m for path, m in named if isinstance(m, nn.Linear) and ".lora_" not in path}


def weight_layers(module: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Like `linear_layers`, with convolutions: what adapter files of other trainers may change."""
    named = ((path.removesuffix(".base_layer"), m) for path, m in module.named_modules())
    return {path: m for path, m in named if isinstance(m, nn.Linear | nn.Conv2d) and ".lora_" not in path}


def layers_of(components: Mapping[str, nn.Module]) -> dict[str, nn.Linear | nn.Conv2d]:
    """`weight_layers` of all components of a base by `<component>.<path>`, in the base's module order."""
    return {f"{name}.{path}": m for name, module in components.items() for path, m in weight_layers(module).items()}


def all_parameters(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Every parameter by stock path, in module order, as (its module, its attribute); PEFT's own are left out."""
    return {
        f"{path.removesuffix('.base_layer')}.{name}".lstrip("."): (inner, name)
        for path, inner in module.named_modules()
        for name, parameter in inner._parameters.items()
        if parameter is not None and ".lora_" not in path
    }


def matrix_shape(layer: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    """`[out, in]` of a layer's weight; a convolution's `in` counts channels times taps."""
    weight = cast(Tensor, layer._parameters["weight"])
    return weight.shape[0], weight[0].numel()
