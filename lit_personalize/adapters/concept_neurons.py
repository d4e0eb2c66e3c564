"""Concept neurons (Cones; Liu et al., 2023, arXiv 2303.05125): weights of cross-attention that a concept does without.

A neuron is one scalar of a K or V matrix. Every neuron has a scale, W = W0 ⊙ (1 + c) with c = 0 at the start, and the
loss of the concept says how it should move: ∂L/∂c = θ ⊙ ∂L/∂θ. Plain SGD with the paper's ρ as learning rate scales
neurons down step by step and leaves -c = ρ · Σ_k θ ⊙ ∂L/∂θ, the accumulated score. Neurons whose score is high enough
are the concept's: shut off (θ = 0), they lower its loss.

So the scores are ordinary factors of an ordinary adapter: no objective, no hook, and resuming, averaging and several
ranks are those of any training. It needs an optimizer whose steps are the gradients: SGD without momentum or decay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lit_personalize.adapters.effective_weights import EffectiveWeights
from lit_personalize.adapters.key_value_delta import cross_attention
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.backbones.base import Base
from lit_personalize.errors import UsageError


def select_neurons(
    scores: Mapping[str, Tensor], share: float | None = None, threshold: float | None = None
) -> dict[str, Tensor]:
    """Sorted flat int32 indices of the concept neurons of every layer; layers without any are left out.

    Args:
        scores: By layer, `[out, in]`. Only positive ones are chosen: the others' neurons would raise the loss.
        share: Take this share (0 to 1) of all weights, the highest scores of all layers together.
        threshold: Take scores above this.

    Raises:
        UsageError: Not exactly one of `share` and `threshold` is given, or it is out of range.
    """
    if (share is None) == (threshold is None):
        raise UsageError("concept neurons are chosen by share or by threshold: give one, and null for the other")
    if share is not None and not 0 < share <= 1:
        raise UsageError(
            f"share of concept neurons must be above 0 and at most 1 (0.01: one in a hundred), not {share}"
        )
    if threshold is not None and threshold < 0:
        raise UsageError(f"threshold of concept neurons must not be negative, not {threshold}")
    flat = torch.cat([score.flatten() for score in scores.values()])
    chosen = flat > (threshold or 0.0)
    if share is not None:
        highest = torch.zeros_like(chosen)
        highest[flat.topk(max(1, round(share * len(flat)))).indices] = True
        chosen &= highest
    parts = chosen.split([score.numel() for score in scores.values()])
    found = {layer: part.nonzero().flatten().int() for layer, part in zip(scores, parts, strict=True)}
    return {layer: indices for layer, indices in found.items() if len(indices)}


def placed(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """`values` `[n]` at flat `indices` `[n]` of a weight, zeros elsewhere; in fp32, with a gradient to the values."""
    flat = torch.zeros(weight.numel(), device=weight.device)
    index = indices.to(weight.device, torch.int64)
    return flat.index_put((index,), values.to(weight.device).float()).reshape(weight.shape)


def shut_change(weight: Tensor, indices: Tensor, values: Tensor | None = None) -> Tensor:
    """ΔW in fp32 that makes the weights at flat `indices` zero, or the `values` `[n]`."""
    change = -weight.flatten()[indices.to(weight.device, torch.int64)].float()
    return placed(change if values is None else values.to(weight.device) + change, indices, weight)


class ConceptNeurons(EffectiveWeights):
    """A scale for every weight of cross-attention K and V while scores accumulate, a mask of them afterwards.

    Where gradients flow, layers show W0 ⊙ (1 + c); without gradients (samples, held-out loss) they show what will be
    exported: W0 with its concept neurons at zero.

    Args:
        share: Concept neurons, as a share of all weights (0.01: one in a hundred); null with `threshold`.
        threshold: Of the accumulated score -c = ρ · Σ θ ⊙ ∂L/∂θ; divide by ρ times the steps for the mean score.
        which: "cross_kv" (K and V, as the paper) or "cross" (Q, K, V and out).
    """

    def __init__(
        self,
        share: float | None = 0.01,
        threshold: float | None = None,
        which: Literal["cross_kv", "cross"] = "cross_kv",
        name: str = "concept_neurons",
        lr: float | None = None,
        weight_decay: float | None = None,
    ):
        super().__init__(name, lr, weight_decay)
        select_neurons({name: torch.zeros(1)}, share, threshold)  # refuses wrong options before a base is loaded
        self.share = share
        self.threshold = threshold
        self.which = which

    def choose(self, base: Base) -> dict[str, tuple[nn.Module, str]]:
        return cross_attention(base, self.which)

    def neurons(self) -> dict[str, Tensor]:
        """The concept neurons by the scores so far: flat int32 indices by layer."""
        scores = {layer: -self.factor(layer).detach() for layer in self._shadows}
        return select_neurons(scores, self.share, self.threshold)

    def refresh(self, dtype: torch.dtype) -> None:
        scaled = self.active and torch.is_grad_enabled()
        neurons = self.neurons() if self.active and not scaled else {}
        for layer, shadow in self._shadows.items():
            shadow.shut(self.name, neurons.get(layer))
            shadow.set(self.name, self.delta(layer) if scaled else None)

    def delta(self, layer: str) -> Tensor:
        """W0 ⊙ c: the change while scores accumulate."""
        return self.frozen(layer).float() * self.factor(layer)

    def export_weights(self) -> AdapterWeights:
        neurons = {layer: indices.cpu() for layer, indices in self.neurons().items()}
        frozen = {layer: self.frozen(layer).detach().cpu() for layer in neurons}
        dense = {layer: shut_change(frozen[layer], indices) for layer, indices in neurons.items()}
        return AdapterWeights(dense=dense, neurons=neurons)
