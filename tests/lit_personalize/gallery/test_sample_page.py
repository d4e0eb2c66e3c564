"""The page and the picture of a grid: right place, right label, nothing but text where text was given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lit_personalize.cli.main import main
from lit_personalize.gallery.pages import size
from lit_personalize.gallery.sample_page import write_cells
from lit_personalize.sampling.cells import Cells
from lit_personalize.sampling.grid import GAP, labelled_grid

NASTY = "a <script>alert(\"x\")</script> & 'cat'"


def cells(prompts: int = 2, seeds: int = 2, groups: int = 2, strengths: int = 2, side: int = 64) -> Cells:
    """Every picture of another grey."""
    count = prompts * seeds * groups * strengths
    greys = np.arange(1, count + 1, dtype=np.uint8).reshape(prompts, seeds, groups, strengths, 1, 1, 1)
    pictures = np.broadcast_to(greys * (200 // count), (prompts, seeds, groups, strengths, side, side, 3))
    names = [NASTY, "other & more"][:groups]
    return Cells(
        [NASTY, "a dog"][:prompts], [7, 8][:seeds], names, [0.0, 0.5][:strengths], np.ascontiguousarray(pictures)
    )


def test_every_picture_stands_under_its_labels(tmp_path: Path, check_page: Callable[[Path], Any]) -> None:
    made = cells()
    records = write_cells(made, tmp_path)
    page = check_page(tmp_path / "index.html")
    assert "".join(page.text).count(NASTY) == 2, "the prompt and the adapter, as text"
    assert len(page.all("script")) == 2, "those of the page itself"
    images = page.all("img")[: len(records)]
    assert [image["class"] for image in images] == ["pixels"] * 16
    for row, (prompt, seed) in enumerate(made.axes()[0]):
        for column, (group, strength) in enumerate(made.axes()[1]):
            image = images[row * 4 + column]
            assert image["alt"] == f"{prompt}, {seed}, {group}, {strength}"
            pixels = np.asarray(Image.open(tmp_path / image["src"]))
            assert np.array_equal(pixels, made.table()[row, column])
    by_file = {Path(record["file"]).name: record for record in records}
    assert by_file["01_8_a0_0.5.png"] == {
        "file": str(tmp_path / "01_8_a0_0.5.png"), "prompt": "a dog", "seed": 8, "adapters": NASTY, "strength": 0.5,
    }  # fmt: skip


def test_names_of_files_are_short_for_one_adapter(tmp_path: Path, check_page: Callable[[Path], Any]) -> None:
    write_cells(cells(groups=1, strengths=1), tmp_path)
    check_page(tmp_path / "index.html")
    assert {p.name for p in tmp_path.glob("0*.png")} == {"00_7.png", "00_8.png", "01_7.png", "01_8.png"}


@pytest.mark.parametrize(("side", "shown"), [(64, 256), (300, 300), (1024, 512)])
def test_pictures_of_every_size_are_labelled_readably(side: int, shown: int) -> None:
    made = cells(1, 2, 1, 2, side)
    sheet = np.asarray(labelled_grid(made.table(), *made.axes()).convert("L"))
    left = shown * 3 // 4
    assert sheet.shape[1] == left + 2 * (shown + GAP) + GAP
    top = sheet.shape[0] - 2 * (shown + GAP)
    for row in range(2):
        for column in range(2):
            y, x = top + row * (shown + GAP), left + GAP + column * (shown + GAP)
            assert (sheet[y : y + shown, x : x + shown] == made.table()[row, column, 0, 0, 0]).all()
    for part in (sheet[:top, left : left + shown], sheet[top : top + shown, :left], sheet[top + shown :, :left]):
        dark = np.flatnonzero((part < 100).any(axis=1))
        assert len(dark) >= shown // 40, "letters are there, and grow with the pictures"


def test_sizes_are_those_that_people_read() -> None:
    assert [size(n) for n in (0, 999, 1000, 3_113_784, 367_000, 4_200_000_000)] == [
        "0 bytes", "999 bytes", "1.0 kB", "3.1 MB", "367 kB", "4.2 GB",
    ]  # fmt: skip


def test_the_verb_leaves_pictures_grid_and_page(
    tiny_bases: dict[str, Path], tmp_path: Path, check_page: Callable[[Path], Any]
) -> None:
    given = ["sample", NASTY, "a dog", "--base", str(tiny_bases["sd1"]), "--steps", "1", "--seeds", "1", "2"]
    assert main([*given, "--scheduler", "ddpm", "-o", str(tmp_path)]) == 0
    page = check_page(tmp_path / "index.html")
    assert [image.get("src") for image in page.all("img")[:4]] == ["00_1.png", "00_2.png", "01_1.png", "01_2.png"]
    assert (tmp_path / "grid.png").is_file()
