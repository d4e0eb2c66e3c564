"""The CLIP that ranks captions: batches of alike pictures, and every caption that is true of a picture matches it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_personalize.metrics.caption_encoder import CaptionEncoder
from lit_personalize.tinyworld import clip
from lit_personalize.tinyworld.dataset import Pictures
from lit_personalize.tinyworld.paraphrases import facts
from lit_personalize.tinyworld.render import render
from lit_personalize.tinyworld.scene import Scene, Thing

SHAPES = ("circle", "ring", "star", "heart")


def scene(shape: str, color: str, background: str) -> Scene:
    return Scene("object", (Thing(shape, color),), background)


def test_groups_are_alike_in_kind_background_and_color() -> None:
    red = [scene(shape, "red", "white") for shape in SHAPES] * 2
    blue = [scene("circle", "blue", "white")] * 7  # one too few for a group
    critters = [Scene("critter", background="sea", color="red")] * 9
    groups = clip.groups_alike([*red, *blue, *critters])
    assert [group.tolist() for group in groups] == [list(range(8)), list(range(15, 24))]
    assert [group.tolist() for group in clip.groups_alike(blue)] == [list(range(7))], "all, where no group is large"


def test_matches_are_the_captions_that_are_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = [scene(SHAPES[i % 4], ("red", "blue", "green", "black")[i // 16], "white") for i in range(64)]
    pictures = Pictures(np.stack([render(s) for s in scenes]), scenes)
    batches: list[list[tuple[Scene, Any]]] = [[]]
    seen: list[Tensor] = []
    write, loss = clip.alt_text, clip.contrastive_loss

    def written(shown: Scene, rng: np.random.Generator) -> Any:
        text, said = write(shown, rng)
        batches[-1].append((shown, said))
        return text, said

    def measured(images: Tensor, texts: Tensor, scale: Tensor, matches: Tensor) -> Tensor:
        seen.append(matches)
        batches.append([])
        return loss(images, texts, scale, matches)

    monkeypatch.setattr(clip, "alt_text", written)
    monkeypatch.setattr(clip, "contrastive_loss", measured)
    told: list[str] = []
    model = clip.train_clip(
        tmp_path / "state", tmp_path / "out", steps=2, batch=12, pictures=pictures, alike=0.5, alt_texts=True,
        log=told.append,
    )  # fmt: skip
    assert len(seen) == 2
    for matches, batch in zip(seen, batches, strict=False):
        expected = [[said <= facts(shown) for _, said in batch] for shown, _ in batch]
        assert matches.tolist() == expected and matches.diagonal().all()
        assert int(matches.sum()) > len(batch), "captions that leave things out are true of several pictures"
        assert len({shown.things[0].color for shown, _ in batch[:6]}) == 1, "half of the batch is alike"
    vectors = CaptionEncoder(tmp_path / "out").texts(["a photo of a heart", "love symbol"])
    assert vectors.shape == (2, clip.PROJECTION)
    weights = model.state_dict()["text_projection.weight"]
    assert torch.isfinite(weights).all()


def test_the_loss_is_least_where_all_matches_are_near() -> None:
    """Two pictures of one kind, one of another: the second caption is true of both of the first."""
    matches = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    scale = torch.tensor(3.0)
    good = clip.contrastive_loss(images, images, scale, matches)
    assert float(good) == pytest.approx(2 * np.log(2) / 3, abs=1e-3)
    assert float(clip.contrastive_loss(images, images.flip(0), scale, matches)) > float(good) + 1
