"""Local editing in prompt-to-prompt (Hertz et al., 2022, arXiv 2208.01626, sec. 3.2): an edit acts where its words do.

After every step t, with averages over the steps so far of the cross-attention maps of a word w of the source and of
a word w* of the edit, and B(x) = 1 where x > k:

    α = B(M_w) ∪ B(M*_w*),    z*_{t-1} <- (1 - α) ⊙ z_{t-1} + α ⊙ z*_{t-1}.

Maps are those before any is replaced, averaged over heads and layers, enlarged to the latent, and divided by their
largest value, so that k is a share of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_kernels.attention import AttentionProcessor
from lit_personalize.errors import UsageError
from lit_personalize.sampling.heat_maps import HeatMaps
from lit_personalize.sampling.words import Words

THRESHOLD = 0.3
"""k of all the paper's experiments."""


class LocalBlend:
    """A tap that sees where words act, and the change of latents that follows from it.

    Args:
        prompts: The source and its edits, in the order of the rows.
        words: Of the source, of the edits, or of both; the mask is the union over all that are found.

    Raises:
        UsageError: A word is in no prompt, or neither the source nor some edit has any of them.
    """

    def __init__(self, prompts: Sequence[Words], words: Sequence[str], threshold: float = THRESHOLD):
        self.threshold = threshold
        self.maps = HeatMaps(len(prompts))
        self.positions = [[prompt.positions(word) for word in words if prompt.has(word)] for prompt in prompts]
        for word in words:
            if not any(prompt.has(word) for prompt in prompts):
                raise UsageError(f"no prompt has the word {word!r} to blend by; write one of the source or of an edit")
        for prompt, own in zip(prompts[1:], self.positions[1:], strict=True):
            if not (own or self.positions[0]):
                raise UsageError(f"{' '.join(prompt.words)!r} has none of the words to blend by; name one of its own")

    def __call__(self, processor: AttentionProcessor, probabilities: Tensor) -> None:
        self.maps(processor, probabilities)

    def masks(self, size: tuple[int, int]) -> Tensor:
        """Where each edit may differ from the source, bool `[edits, 1, h, w]`, by the steps seen so far."""
        enlarged = F.interpolate(self.maps.average(), size, mode="bilinear", align_corners=False)
        found = []
        for row, spans in zip(enlarged, self.positions, strict=True):
            mask = torch.zeros(size, dtype=torch.bool, device=row.device)
            for span in spans:
                acts = row[span].sum(0)
                mask |= acts > self.threshold * acts.max()
            found.append(mask)
        return torch.stack([found[0] | own for own in found[1:]])[:, None]

    def blend(self, latents: Tensor) -> Tensor:
        """Latents `[1 + edits, C, h, w]` with the source's values outside each edit's mask, to the bit."""
        source, edits = latents[:1], latents[1:]
        return torch.cat([source, torch.where(self.masks((latents.shape[-2], latents.shape[-1])), edits, source)])
