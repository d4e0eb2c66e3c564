"""Two subjects in a scene are found where the renderer draws them, and not where they are missing or mixed up."""

from __future__ import annotations

from functools import cache

import numpy as np

from lit_personalize.tinyworld.build import committed_weights
from lit_personalize.tinyworld.concepts import HELD_OUT_CONCEPTS
from lit_personalize.tinyworld.pair_scenes import asked_pairs, half, pair_prompt, pair_scene, pair_shares
from lit_personalize.tinyworld.reader import Reader
from lit_personalize.tinyworld.render import render

FIRST, SECOND = HELD_OUT_CONCEPTS["small-lime-circle"], HELD_OUT_CONCEPTS["small-navy-oval"]
OTHER = HELD_OUT_CONCEPTS["small-maroon-hexagon"]
ASKED = asked_pairs(FIRST, SECOND)


@cache
def drawn(swapped: bool = False, other: bool = False) -> np.ndarray:
    pair = (FIRST, OTHER if other else SECOND)
    return np.stack([render(pair_scene(*(pair[::-1] if swapped else pair), *how)) for how in ASKED])


@cache
def reader() -> Reader:
    return Reader.load(committed_weights() / "reader")


def test_both_are_found_where_they_are_drawn_in_either_order() -> None:
    for swapped in (False, True):
        found = pair_shares(drawn(swapped), FIRST, SECOND, ASKED, reader())
        assert found["both colours"] == found["background"] == 1 and found["attributes"] > 0.95, found
        assert found["both subjects"] > 0.8


def test_one_of_two_is_half() -> None:
    found = pair_shares(drawn(other=True), FIRST, SECOND, ASKED, reader())
    assert found["one colour"] == 1 and found["both colours"] == found["both subjects"] == 0
    assert 0.5 < found["attributes"] < 0.75


def test_colours_that_share_a_half_are_not_both_found() -> None:
    """Mixed in one half, the other empty."""
    mixed = drawn().copy()
    for picture, (relation, _) in zip(mixed, ASKED, strict=True):
        if relation in ("left", "right"):
            picture[:, :32][:, ::2], picture[:, 32:] = picture[:, 32:][:, ::2], picture[0, 0]
        else:
            picture[:32][::2], picture[32:] = picture[32:][::2], picture[0, 0]
    assert pair_shares(mixed, FIRST, SECOND, ASKED, reader())["both colours"] == 0


def test_halves_follow_the_relation() -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, 32:, 0] = 255
    assert half(picture, "left", 1)[..., 0].min() == 255 and half(picture, "right", 0).max() == 0
    assert half(picture.transpose(1, 0, 2), "above", 1)[..., 0].min() == 255


def test_the_prompt_is_a_sentence_of_the_captions() -> None:
    said = pair_prompt("<new1> circle", "<new2> oval", "left", "orange")
    assert said == "a <new1> circle to the left of a <new2> oval on an orange background"
