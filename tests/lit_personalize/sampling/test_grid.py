"""Grids: every picture stands where it belongs, every caption fits below its picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageFont

from lit_personalize.sampling.grid import captioned_grid, wrap

WORDS = "a photo of a small red cat on a wooden table beside a very large blue vase in the morning light"


@pytest.mark.parametrize("width", [40, 90, 400])
def test_lines_are_no_wider_than_asked_and_keep_every_word(width: int) -> None:
    font = ImageFont.load_default(10)
    lines = wrap(WORDS, font, width, 99)
    assert " ".join(lines) == WORDS
    assert all(font.getlength(line) <= width or " " not in line for line in lines)
    joined = [font.getlength(f"{a} {b.split()[0]}") for a, b in zip(lines, lines[1:], strict=False)]
    assert all(length > width for length in joined), "a line takes all that fits"


def test_what_does_not_fit_ends_in_an_ellipsis() -> None:
    font = ImageFont.load_default(10)
    whole, cut = wrap(WORDS, font, 90, 99), wrap(WORDS, font, 90, 2)
    assert len(whole) > 2 == len(cut) and cut[0] == whole[0]
    assert cut[1].endswith("…") and whole[1].startswith(cut[1][:-1]) and font.getlength(cut[1]) <= 90
    assert wrap("", font, 90, 2) == [] and wrap("Donaudampfschifffahrt", font, 10, 2) == ["Donaudampfschifffahrt"]


def test_pictures_stand_row_by_row_above_their_captions() -> None:
    pictures = np.stack([np.full((4, 6, 3), 50 * n, np.uint8) for n in range(1, 4)])
    pixels = np.asarray(captioned_grid(pictures, ["", "a cat", ""], columns=2, zoom=10))
    assert pixels.shape == (2 * (40 + 44) + 8, 2 * (60 + 8) + 8, 3)
    for n, (x, y) in enumerate([(8, 8), (76, 8), (8, 92)]):
        assert (pixels[y : y + 40, x : x + 60] == 50 * (n + 1)).all()
    assert (pixels[48:92, 8:68] == 255).all() and (pixels[48:92, 76:136] < 128).any()


def test_both_grids_break_lines_alike() -> None:
    """One function, so that a prompt reads the same in a run's grid and in that of `litp sample`."""
    from lit_callbacks import picture_grid

    assert picture_grid.wrap is wrap
