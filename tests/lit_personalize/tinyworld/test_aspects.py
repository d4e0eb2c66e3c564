"""Heads that supervise a CLIP by what is said, and the retrieval CLIP that came of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lit_personalize.metrics.caption_encoder import CaptionEncoder
from lit_personalize.tinyworld import vocabulary as v
from lit_personalize.tinyworld.aspects import PARTS, AspectHeads
from lit_personalize.tinyworld.build import committed_weights
from lit_personalize.tinyworld.captions import with_article
from lit_personalize.tinyworld.paraphrases import INDIRECT, Facts


def told(*pairs: tuple[str, str]) -> Facts:
    return frozenset(pairs)


def test_what_is_not_told_teaches_nothing() -> None:
    torch.manual_seed(0)
    heads, embeddings = AspectHeads(8), torch.randn(3, 8)
    facts = [told(("kind", "object"), ("shape", "star")), told(("kind", "critter"), ("part", "horns")),
             told(("kind", "pair"), ("shape", "star"), ("shape", "ring"))]  # fmt: skip
    loss, right = heads.loss(embeddings, facts, whole=False)
    loss.backward()
    assert set(right) == {"kind", "shape"}
    assert set(heads.loss(embeddings[2:], facts[2:], whole=False)[1]) == {"kind"}, "two shapes are no answer"
    gradients = {name: head.weight.grad for name, head in heads.heads.items()}
    assert {name for name, gradient in gradients.items() if gradient is not None} == {"kind", "shape"}
    rows = heads.parts.weight.grad
    assert rows is not None and set(np.flatnonzero(rows.abs().sum(1) > 0)) == {PARTS.index("horns")}
    heads.zero_grad()
    heads.loss(embeddings, facts, whole=True)[0].backward()
    assert heads.parts.weight.grad is not None and (heads.parts.weight.grad.abs().sum(1) > 0).all()


def test_the_loss_is_the_mean_of_the_aspects() -> None:
    """Of zero heads every aspect is at chance."""
    heads = AspectHeads(4)
    for parameter in heads.parameters():
        torch.nn.init.zeros_(parameter)
    facts = [told(("kind", "object"), ("shape", "star"), ("part", "hat"))]
    loss, _ = heads.loss(torch.randn(1, 4), facts, whole=False)
    chances = [np.log(5), np.log(len(v.ALL_SHAPES)), np.log(2) / len(PARTS)]
    assert float(loss.detach()) == pytest.approx(np.mean(chances), rel=1e-5)


@pytest.mark.parametrize("color", ["red", "blue"])
def test_the_retrieval_clip_finds_what_is_not_named(color: str) -> None:
    """A class that is named is nearest to its own paraphrases among those of all classes."""
    encoder = CaptionEncoder(committed_weights() / "retrieval_clip")
    shapes = list(v.ALL_SHAPES)
    others = [(shape, phrase) for shape in shapes for phrase in INDIRECT[shape]]
    named = encoder.texts([f"a photo of {with_article(color)} {shape}" for shape in shapes])
    indirect = encoder.texts([with_article(f"{color} {phrase}") for _, phrase in others])
    nearest = [others[i][0] for i in (named @ indirect.T).argmax(1)]
    assert nearest == shapes
