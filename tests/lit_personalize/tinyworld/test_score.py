"""Scores: the committed reader against real renders, what counts as wrong, and what the committed base draws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lit_personalize.tinyworld.build import committed_weights
from lit_personalize.tinyworld.card import ASKED, table
from lit_personalize.tinyworld.card import test_scenes as unseen_scenes
from lit_personalize.tinyworld.reader import Reader
from lit_personalize.tinyworld.render import render
from lit_personalize.tinyworld.scene import Scene, Thing
from lit_personalize.tinyworld.score import score_pictures

COUNTS = {"object": 100, "critter": 20}


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader.load(committed_weights() / "reader")


@pytest.fixture(scope="module")
def real() -> tuple[list[Scene], np.ndarray]:
    return unseen_scenes(COUNTS, seed=31)  # type: ignore[arg-type]


def test_the_reader_reads_real_renders(reader: Reader, real: tuple[list[Scene], np.ndarray]) -> None:
    scores = score_pictures(real[1], real[0], reader)
    assert scores["shape"] > 0.9 and scores["shape, flat-filled"] > 0.93 and scores["texture"] > 0.85
    assert min(scores[n] for n in ("object colour", "background", "critter attributes", "critter colour")) > 0.94
    assert scores["background, from pixels"] == scores["object colour, from pixels"] == 1


def test_another_kind_is_wrong_in_all_its_attributes(reader: Reader, real: tuple[list[Scene], np.ndarray]) -> None:
    scenes, pixels = real
    swapped = np.concatenate([pixels[-20:], pixels[:20]])
    scores = score_pictures(swapped, scenes[:20] + scenes[-20:], reader)
    assert scores["shape"] == scores["critter attributes"] == scores["critter colour"] == 0


def test_flat_shapes_are_scored_apart(reader: Reader) -> None:
    things = [Thing("circle", "red"), Thing("circle", "red", "striped")]
    scenes = [Scene("object", (thing,), background="blue") for thing in things]
    square = Scene("object", (Thing("square", "red", "striped"),), background="blue")
    drawn = np.stack([render(scenes[0]), render(square)])
    scores = score_pictures(drawn, scenes, reader)
    assert scores["shape, flat-filled"] == 1 and scores["shape"] == 0.5


def test_the_card_is_that_of_these_weights() -> None:
    from lit_personalize.backbones.fingerprint import fingerprint_of

    card = json.loads((committed_weights() / "card.json").read_text())
    assert card["fingerprint"] == fingerprint_of(committed_weights() / "base")
    assert all(card["base"][name] >= floor for name, (_, floor) in ASKED.items())


def test_the_page_shows_the_card_of_these_weights() -> None:
    docs = Path(__file__).parents[3] / "docs"
    card = json.loads((committed_weights() / "card.json").read_text())
    assert (docs / "tinyworld_scores.md").read_text() == table(card) + "\n"
    assert f"`{card['version']}`" in (docs / "tinyworld.md").read_text()
