"""Full-matrix changes of cross-attention (Custom Diffusion, Kumari et al., 2022, arXiv 2212.04488, sec. 3.2).

W = W0 + Δ with a trained fp32 Δ that starts at zero, for `to_k` and `to_v` of every `attn2` (or all
four matrices). The sum is formed once a step in the base's dtype and shadows the layer's weight;
the base's own parameters and state dict are never touched.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from lit_personalize.adapters.protocol import Adapter, AdapterWeights
from lit_personalize.backbones.base import Base
from lit_personalize.errors import UsageError

LAYERS: dict[str, tuple[str, ...]] = {
    "cross_kv": ("attn2.to_k", "attn2.to_v"),
    "cross": ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
}


def select_layers(unet: nn.Module, which: str) -> dict[str, nn.Linear]:
    """Linear layers of a UNet by stock path, in module order, whose path ends in one of `LAYERS[which]`.

    Layers that PEFT wrapped count under their own path.
    """
    if which not in LAYERS:
        raise UsageError(f"unknown layers {which!r}; use one of {', '.join(LAYERS)}")
    linears = ((p.removesuffix(".base_layer"), m) for p, m in unet.named_modules() if isinstance(m, nn.Linear))
    return {path: module for path, module in linears if path.endswith(LAYERS[which])}


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
    ):
        super().__init__(name, lr, weight_decay)
        self.which = which
        self.detach_first_token = detach_first_token
        self._linears: dict[str, nn.Linear] = {}

    def attach(self, base: Base, seed: int = 0) -> None:
        if self.attached:
            return
        for adapter in base.adapters:
            if isinstance(adapter, KeyValueDelta):
                raise UsageError(f"{adapter.name!r} and {self.name!r} both replace cross-attention weights; keep one")
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
            self._shadow(linear, (_frozen(linear) + self.factor(layer)).to(dtype) if self.active else None)

    @staticmethod
    def _shadow(linear: nn.Linear, weight: Tensor | None) -> None:
        """Let `linear.weight` read as `weight`; None shows the frozen parameter again."""
        linear.__dict__.pop("weight", None)
        if weight is not None:
            linear.__dict__["weight"] = weight

    def set_active(self, active: bool) -> None:
        if active != self.active:
            self.active = active
            self.refresh(_frozen(next(iter(self._linears.values()))).dtype)

    def layers(self) -> list[str]:
        return list(self._linears)

    def delta(self, layer: str) -> Tensor:
        return self.factor(layer)

    def export_weights(self) -> AdapterWeights:
        return AdapterWeights(dense={n: self.factor(n).detach().float().cpu().clone() for n in self.layers()})


def _frozen(linear: nn.Linear) -> Tensor:
    """The registered parameter, whatever `weight` shows at the moment."""
    return cast(Tensor, linear._parameters["weight"])
