"""Held-out styles: what is trained on and what is asked for differ, and the reader tells the style and its absence."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from lit_personalize.tinyworld import vocabulary as v
from lit_personalize.tinyworld.build import committed_weights
from lit_personalize.tinyworld.concepts import HELD_OUT_CONCEPTS
from lit_personalize.tinyworld.reader import Reader
from lit_personalize.tinyworld.render import render
from lit_personalize.tinyworld.style_concepts import (
    PLACES,
    STYLES_FOR_SCIENCE,
    asked_scenes,
    known_styles,
    style_pictures,
    style_shares,
    styled_scene,
    styled_subject_shares,
    write_style_photos,
)


@cache
def reader() -> Reader:
    return Reader.load(committed_weights() / "reader")


@pytest.mark.parametrize("style", STYLES_FOR_SCIENCE)
def test_the_reader_tells_a_style_from_its_absence(style: str) -> None:
    scenes = asked_scenes(style)
    styled = style_shares(np.stack([render(scene) for scene in scenes]), scenes, reader())
    plain = style_shares(np.stack([render(replace(s, style="photo")) for s in scenes]), scenes, reader())
    assert styled["style"] >= 0.5 and styled["content"] >= 0.75 and plain["style"] == 0, (styled, plain)
    assert plain["content"] >= 0.95 and plain["style and content"] == 0


def test_nothing_that_is_asked_was_trained_on() -> None:
    asked = [replace(scene, seed=0) for scene in asked_scenes("blueprint")]
    for seed in range(3):
        trained = style_pictures("blueprint", 5, seed).scenes
        assert {scene.style for scene in trained} == {"blueprint"} and len({s.background for s in trained}) == 5
        assert not [scene for scene in trained if replace(scene, seed=0) in asked]


def test_captions_call_the_style_by_its_word(tmp_path: Path) -> None:
    write_style_photos("halftone", tmp_path / "photos", 5, 0, "<new1>")
    captions = [path.read_text().strip() for path in sorted((tmp_path / "photos").glob("*.txt"))]
    assert len(captions) == 5 and all(said.endswith(" in <new1> style") for said in captions)
    assert not [said for said in captions if "halftone" in said]


def test_the_regularization_set_has_every_known_style_and_no_other() -> None:
    assert {scene.style for scene in known_styles(18).scenes} == set(v.STYLES)


def test_a_subject_in_a_style_is_found_by_both() -> None:
    subject = HELD_OUT_CONCEPTS["critter-03"]
    scenes = [styled_scene(subject, "negative", place, i) for i, place in enumerate(PLACES)]
    drawn = np.stack([render(scene) for scene in scenes])
    plain = np.stack([render(replace(scene, style="photo")) for scene in scenes])
    found, without = (styled_subject_shares(pixels, scenes, subject, reader()) for pixels in (drawn, plain))
    assert found["subject"] > 0.8 and found["style"] > 0.8 and 0.6 < found["both"] <= found["subject"]
    assert without["subject"] > 0.9 and without["style"] == without["both"] == 0
