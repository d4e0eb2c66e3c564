"""Full-matrix changes of cross-attention (Custom Diffusion, Kumari et al., 2022, arXiv 2212.04488, sec. 3.2).

W = W0 + Δ with a trained fp32 Δ that starts at zero, for `to_k` and `to_v` of every `attn2` (or all
four matrices). The sum is formed once a step and stands in for the layer's weight (`shadow.py`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lit_personalize.adapters.protocol import Adapter, AdapterWeights
from lit_personalize.adapters.shadow import WeightShadow, linear_layers
from lit_personalize.backbones.base import Base
from lit_personalize.errors import UsageError

LAYERS: dict[str, tuple[str, ...]] = {
    "cross_kv": ("attn2.to_k", "attn2.to_v"),
    "cross": ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
}


def select_layers(unet: nn.Module, which: str) -> dict[str, nn.Linear]:
    """Linear layers of a UNet by stock path, in module order, whose path ends in one of `LAYERS[which]`."""
    if which not in LAYERS:
        raise UsageError(f"unknown layers {which!r}; use one of {', '.join(LAYERS)}")
    return {path: linear for path, linear in linear_layers(unet).items() if path.endswith(LAYERS[which])}


class KeyValueDelta(Adapter):
    """Dense ΔW on cross-attention.

    Args:
        which: "cross_kv" (K and V: 2.2 % of SD1's weights) or "cross" (Q, K, V and out; for faces).
        detach_first_token: No gradient through the start token's K and V rows, as in the reference method.
    """

    def __init__(
        self,
        which: Literal["cross_kv", "cross"] = "cross_kv",
        detach_first_token: bool = True,
        name: str = "key_value_delta",
        lr: float | None = None,
        weight_decay: float | None = None,
        span: tuple[float, float] = (0, 1),
    ):
        super().__init__(name, lr, weight_decay, span)
        self.which = which
        self.detach_first_token = detach_first_token
        self._linears: dict[str, nn.Linear] = {}

    def attach(self, base: Base, seed: int = 0) -> None:
        if self.attached:
            return
        base.register(self)
        for path, linear in select_layers(base.unet, self.which).items():
            layer = f"unet.{path}"
            self._linears[layer] = linear
            self.add_factor(layer, torch.zeros(linear.weight.shape))
        for processor in base.processors.values():
            if processor.is_cross:
                processor.detach_first_token = self.detach_first_token
        self.attached = True
        self.refresh(base.dtype)

    def refresh(self, dtype: torch.dtype) -> None:
        for layer, linear in self._linears.items():
            WeightShadow.of(linear).set(self.name, self.factor(layer) if self.active else None)

    def set_active(self, active: bool) -> None:
        if active != self.active:
            self.active = active
            self.refresh(torch.float32)

    def layers(self) -> list[str]:
        return list(self._linears)

    def delta(self, layer: str) -> Tensor:
        return self.factor(layer)

    def export_weights(self) -> AdapterWeights:
        return AdapterWeights(dense={n: self.factor(n).detach().float().cpu().clone() for n in self.layers()})
