"""Supervision of a CLIP's embeddings by what pictures show: one linear head per aspect, shared by both towers.

The contrastive loss alone hardly sees shapes, because kind, colour and background already tell most pictures of a
batch apart. Heads that read every aspect from a picture's embedding, and every said aspect from a caption's, are
trained beside it (a supervised term as in UniCL, Yang et al., 2022, arXiv 2204.03610) and thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_personalize.tinyworld import vocabulary as v
from lit_personalize.tinyworld.paraphrases import Facts
from lit_personalize.tinyworld.scene import KIND_SHARES

ASPECTS: dict[str, tuple[str, ...]] = {
    "kind": tuple(KIND_SHARES),
    "shape": v.ALL_SHAPES,
    "color": tuple(v.ALL_COLORS),
    "texture": v.ALL_TEXTURES,
    "background": (*v.ALL_COLORS, *v.PLACES),
    "style": v.ALL_STYLES,
}
PARTS: tuple[str, ...] = tuple(dict.fromkeys((*v.CRITTER_ATTRIBUTES, *v.PERSON_ATTRIBUTES)))
SHARPNESS = 10.0  # of logits of unit vectors
UNKNOWN = -100  # what cross-entropy passes over


class AspectHeads(nn.Module):
    """Reads aspects from unit embeddings `[B, d]`."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in ASPECTS.items()})
        self.parts = nn.Linear(width, len(PARTS))

    def loss(self, embeddings: Tensor, told: Sequence[Facts], whole: bool) -> tuple[Tensor, dict[str, float]]:
        """Mean cross-entropy of the aspects that are told once, and the share of them that is read right.

        Args:
            embeddings: `[B, d]` of pictures, or of captions.
            told: What is known of each.
            whole: Whether a part that is not told is not there (pictures) or may be (captions).
        """
        unit = SHARPNESS * F.normalize(embeddings, dim=1)
        losses, right = [], {}
        for name, head in self.heads.items():
            target = torch.tensor([_single(facts, name) for facts in told])
            known = target != UNKNOWN
            if known.any():
                logits = head(unit[known])
                losses.append(F.cross_entropy(logits, target[known]))
                right[name] = float((logits.argmax(1) == target[known]).float().mean())
        there = torch.tensor([[("part", part) in facts for part in PARTS] for facts in told], dtype=unit.dtype)
        weight = torch.ones_like(there) if whole else there
        if weight.any():
            losses.append(F.binary_cross_entropy_with_logits(self.parts(unit), there, weight))
        return torch.stack(losses).mean(), right


def _single(facts: Facts, aspect: str) -> int:
    values = [value for name, value in facts if name == aspect]
    return ASPECTS[aspect].index(values[0]) if len(values) == 1 else UNKNOWN
