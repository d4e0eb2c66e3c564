"""All weights of the UNet (DreamBooth, Ruiz et al., 2022, arXiv 2208.12242), and of the text encoders if asked.

W = W0 + Δ with a trained fp32 Δ of every parameter: matrices, convolutions, biases, norms, embeddings. The sum is
formed once a step and stands in for the parameter (`shadow.py`), so the base stays whole beside it: with the adapter
off it draws the prior's pictures, and Δ keeps steps that are too small for W0 in bf16.
"""

from __future__ import annotations

from torch import Tensor, nn

from lit_personalize.adapters.effective_weights import EffectiveWeights
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.adapters.shadow import all_parameters, weight_layers
from lit_personalize.backbones.base import Base

OUTSIDE_LORA = ("add_embedding.", "text_projection")
"""Matrices that LoRA clients have no name for: SDXL's embedding of sizes, and the projection of its pooled state."""


class FullWeights(EffectiveWeights):
    """A change of every parameter.

    Weight decay pulls Δ to zero, that is the weights to the base's, where the decay of an optimizer over the weights
    themselves pulls these to zero.

    Args:
        text_encoder: Also all weights of every text encoder.
    """

    def __init__(
        self,
        text_encoder: bool = False,
        name: str = "full_weights",
        lr: float | None = None,
        weight_decay: float | None = None,
    ):
        super().__init__(name, lr, weight_decay)
        self.text_encoder = text_encoder
        self._layers: list[str] = []

    def choose(self, base: Base) -> dict[str, tuple[nn.Module, str]]:
        chosen: dict[str, tuple[nn.Module, str]] = {}
        for component, module in base.components().items():
            if component != "unet" and not (self.text_encoder and component.startswith("text_encoder")):
                continue
            named = (path for path in weight_layers(module) if not path.startswith(OUTSIDE_LORA))
            self._layers += [f"{component}.{path}" for path in named]
            chosen |= {f"{component}.{path}": found for path, found in all_parameters(module).items()}
        return chosen

    def layers(self) -> list[str]:
        return list(self._layers)

    def delta(self, layer: str) -> Tensor:
        return self.factor(f"{layer}.weight").flatten(1)

    def export_weights(self) -> AdapterWeights:
        changes = {name: self.factor(name).detach().float().cpu().clone() for name in self._shadows}
        dense = {layer: changes.pop(f"{layer}.weight").flatten(1) for layer in self._layers}
        return AdapterWeights(dense=dense, parameters=changes)
