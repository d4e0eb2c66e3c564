"""What a linear layer computes, read from the layer: plain, or with PEFT's LoRA around it.

PEFT itself is not imported: its layers are known by what they carry (`base_layer`, `lora_A`, `lora_B`, `scaling`),
which is also how adapters look that own their factors and lend PEFT's layers a view of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Projection:
    """y = x Wᵀ + s · (x Aᵀ) Bᵀ, or without A and B."""

    weight: Tensor
    """W `[out, in]`."""
    down: Tensor | None = None
    """A `[R, in]`; `[G, R, in]` where a bank lends the layer the factors of G adapters."""
    up: Tensor | None = None
    """B `[out, R]`; `[G, out, R]` likewise."""
    scale: float = 1.0
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """R; 0 without factors."""
        return 0 if self.down is None else self.down.shape[-2]


def projection_of(layer: nn.Module) -> Projection | str:
    """What the layer computes now; a string says why it cannot be read.

    Several active adapters become one: their factors stand side by side, their scales are multiplied into B.
    """
    own: dict[str, Any] = layer._modules  # this is read in every call of every layer: no lookup by `__getattr__`
    downs = own.get("lora_A")
    if downs is None:
        if type(layer) is not nn.Linear:
            return f"it is a {type(layer).__name__}"
        return Projection(layer.weight, bias=layer.bias)
    base = own["base_layer"]
    while "base_layer" in base._modules:
        base = base._modules["base_layer"]
    if type(base) is not nn.Linear:
        return f"its base is a {type(base).__name__}"
    plain = Projection(base.weight, bias=base.bias)
    peft: Any = layer
    if peft._disable_adapters or peft.merged_adapters:
        return plain
    ups, active = own["lora_B"]._modules, peft._active_adapter
    found: list[tuple[Tensor, Tensor, float]] = []
    for name in (active,) if isinstance(active, str) else active:
        if name not in downs._modules:
            continue
        if name in peft.lora_variant:
            return f"adapter {name!r} is not plain LoRA"
        if layer.training and not isinstance(own["lora_dropout"]._modules[name], nn.Identity):
            return f"adapter {name!r} has dropout"
        up = ups[name]
        if up.bias is not None:
            return f"adapter {name!r} has a bias"
        found.append((downs._modules[name].weight, up.weight, peft.scaling[name]))
    if not found:
        return plain
    if len(found) == 1:
        plain.down, plain.up, plain.scale = found[0]
        return plain
    plain.down = torch.cat([down for down, _, _ in found], dim=-2)
    plain.up = torch.cat([up * scale for _, up, scale in found], dim=-1)
    return plain
