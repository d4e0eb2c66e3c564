"""The picture tower learns beside a locked caption tower."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from lit_personalize.metrics.caption_encoder import CaptionEncoder
from lit_personalize.tinyworld.build import committed_weights
from lit_personalize.tinyworld.clip import new_clip, save_clip
from lit_personalize.tinyworld.clip_pictures import patch_features, train_pictures
from lit_personalize.tinyworld.dataset import Pictures
from lit_personalize.tinyworld.reader import Reader
from lit_personalize.tinyworld.render import render
from lit_personalize.tinyworld.scene import Scene, Thing
from lit_personalize.tinyworld.tokenizer import build_tokenizer

SHAPES = ("circle", "ring", "star", "heart")


def quiet(_: str) -> None:
    """Progress is not looked at here."""


def test_only_the_picture_tower_moves_and_it_comes_nearer(tmp_path: Path) -> None:
    scenes = [Scene("object", (Thing(s, c),), "white") for s in SHAPES for c in ("red", "blue", "green", "black")]
    pictures = Pictures(np.stack([render(scene) for scene in scenes]), scenes)
    told: list[str] = []
    torch.manual_seed(0)
    start = tmp_path / "start"
    save_clip(new_clip(build_tokenizer(start)), start)
    model = train_pictures(tmp_path / "state", start, tmp_path / "out", steps=50, batch=8, pictures=pictures,
                           log=told.append)  # fmt: skip
    before, after = CaptionEncoder(start), CaptionEncoder(tmp_path / "out")
    captions = ["a red heart on a white background", "a photo of a ring"]
    assert np.array_equal(before.texts(captions), after.texts(captions))
    old, new = (encoder.clip.model.state_dict() for encoder in (before, after))
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved and all(name.startswith(("vision_model.", "visual_projection.")) for name in moved)
    assert torch.allclose(new["visual_projection.weight"], model.visual_projection.weight, atol=1e-3)
    words = before.texts(
        [f"a {scene.things[0].color} {scene.things[0].shape} on a white background" for scene in scenes]
    )
    unit = [F.normalize(encoder.clip.images(pictures.pixels), dim=1).numpy() for encoder in (before, after)]
    near = [float((vectors * words).sum(1).mean()) for vectors in unit]
    assert near[1] > near[0] + 0.3
    assert "cosine" in told[-1] and "shapes seen" in told[-1]


def test_patches_and_places_of_the_reader_correspond() -> None:
    """A thing in the lower left moves the features of patches there, most of all."""
    pixels = torch.zeros(2, 3, 64, 64)
    pixels[1, :, 48:, :16] = 1
    reader = Reader.load(committed_weights() / "reader")
    features = patch_features(reader, pixels)
    assert features.shape == (2, 64, 96)
    assert torch.allclose(features.mean((0, 1)), torch.zeros(96), atol=1e-4)
    moved = (features[1] - features[0]).norm(dim=1).view(8, 8)
    assert moved[6:, :2].mean() > 5 * moved[:4, 4:].mean()
