"""Full-matrix changes of cross-attention (Custom Diffusion, Kumari et al., 2022, arXiv 2212.04488, sec. 3.2).

W = W0 + Δ with a trained fp32 Δ that starts at zero, for `to_k` and `to_v` of every `attn2` (or all
four matrices). The sum is formed once a step and stands in for the layer's weight (`shadow.py`).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from lit_personalize.adapters.effective_weights import EffectiveWeights
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.adapters.shadow import linear_layers
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


def cross_attention(base: Base, which: str) -> dict[str, tuple[nn.Module, str]]:
    """Weights of the UNet that `which` names, as `EffectiveWeights.choose` gives them."""
    return {f"unet.{path}": (linear, "weight") for path, linear in select_layers(base.unet, which).items()}


class KeyValueDelta(EffectiveWeights):
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

    def choose(self, base: Base) -> dict[str, tuple[nn.Module, str]]:
        return cross_attention(base, self.which)

    def attach(self, base: Base, seed: int = 0) -> None:
        if self.attached:
            return
        super().attach(base, seed)
        for processor in base.processors.values():
            if processor.is_cross:
                processor.detach_first_token = self.detach_first_token

    def delta(self, layer: str) -> Tensor:
        return self.factor(layer)

    def export_weights(self) -> AdapterWeights:
        return AdapterWeights(dense={n: self.factor(n).detach().float().cpu().clone() for n in self.layers()})
