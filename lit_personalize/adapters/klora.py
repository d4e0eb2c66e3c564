"""Two LoRAs of which every layer applies one at a time, untrained (K-LoRA, Ouyang et al., 2025, arXiv 2502.18461).

At a share p of the denoising a layer takes the content's LoRA if

    S_c >= γ (α p + β) S_s,    S = sum of the K largest |ΔW| of the layer, K = r_c r_s,    γ = Σ|ΔW_c| / Σ|ΔW_s|,

else the style's: content early, style late, and γ makes up for LoRAs of different strength.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_personalize.adapters.loaded import LoadedAdapter
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.backbones.base import Base
from lit_personalize.errors import UsageError


class KLoRA(LoadedAdapter):
    """Selects per layer and denoising step; tokens of both are always there.

    Args:
        content, style: Low-rank changes; a layer that one of them lacks is the other's throughout.
        slope, offset: α and β; larger ones favour the style.

    Raises:
        UsageError: One has changes that are not low-rank, or both have a token of one name.
    """

    def __init__(
        self,
        content: AdapterWeights,
        style: AdapterWeights,
        name: str = "klora",
        scale: float = 1.0,
        slope: float = 1.5,
        offset: float = 0.5,
    ):
        for weights, what in ((content, "content"), (style, "style")):
            if weights.dense or not weights.low_rank:
                raise UsageError(f"the {what} adapter is no LoRA: K-LoRA selects between low-rank changes")
        if both := set(content.tokens) & set(style.tokens):
            raise UsageError(f"both adapters call their token {both.pop()}: learn one of them anew under another")
        low_rank = {**style.low_rank, **content.low_rank}
        super().__init__(AdapterWeights(low_rank=low_rank, tokens={**content.tokens, **style.tokens}), name, scale)
        self.content, self.style = content.low_rank, style.low_rank
        self.slope, self.offset = slope, offset
        self.scores, self.balance = self._compare()

    def _compare(self) -> tuple[dict[str, tuple[float, float]], float]:
        """S_c and S_s of every layer that both change, and γ."""
        scores, totals = {}, [0.0, 0.0]
        for layer in (layer for layer in self.content if layer in self.style):
            pair = (self.content[layer], self.style[layer])
            sizes = [factors.delta().abs().flatten() for factors in pair]  # dense, but of one layer at a time
            largest = min(pair[0].rank * pair[1].rank, len(sizes[0]))
            scores[layer] = (_top(sizes[0], largest), _top(sizes[1], largest))
            totals = [total + float(size.double().sum()) for total, size in zip(totals, sizes, strict=True)]
        return scores, totals[0] / totals[1] if totals[1] else 1.0

    def takes_style(self, layer: str, progress: float) -> bool:
        """Whether a layer that both change is the style's at this share of the denoising."""
        content, style = self.scores[layer]
        return content < self.balance * (self.slope * progress + self.offset) * style

    def attach(self, base: Base, seed: int = 0) -> None:
        super().attach(base, seed)
        self.at(0.0)

    def at(self, progress: float, timestep: float = 0.0) -> None:
        """Give every layer the LoRA that is chosen at this share of the denoising."""
        for layer in self.scores:
            chosen = (self.style if self.takes_style(layer, progress) else self.content)[layer]
            if self.weights.low_rank[layer] is not chosen:
                self.weights.low_rank[layer] = chosen
                self.put(layer)


def _top(values: Tensor, count: int) -> float:
    return float(torch.topk(values, count).values.double().sum())
