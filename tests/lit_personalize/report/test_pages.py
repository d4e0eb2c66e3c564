"""Numbers in docs are those of the cells beside them, and verdicts follow from intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lit_personalize.errors import DataError
from lit_personalize.report import pages
from lit_personalize.report.pages import ORDERS, judge
from lit_personalize.report.science import METHODS, SEEDS, cell_id, load_cells
from lit_personalize.sampling.grid import GAP, LINE, LINES
from lit_personalize.tinyworld.concepts import SUBJECTS_FOR_SCIENCE

DOCS = Path(__file__).parents[3] / "docs"


def cells_with(**of_method: float) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Every cell, each figure the method's number (0.5 unless given) plus the same noise per subject and seed."""
    found = {}
    for method in METHODS:
        for i, subject in enumerate(SUBJECTS_FOR_SCIENCE):
            for seed in SEEDS:
                value = of_method.get(method.split(",")[0].split()[0], 0.5) + 0.01 * i + 0.003 * seed
                row = {name: value for name in pages.COLUMNS}
                row |= {f"{name}, {s}": 0.1 for name in pages.COLUMNS for s in ("real", "base")}
                found[method, subject, seed] = {**row, "seconds": 60}
    return found


def test_every_page_is_current() -> None:
    cells, fingerprint = load_cells(DOCS / "science")
    for path, text in pages.pages(DOCS, cells, fingerprint).items():
        assert path.read_text(encoding="utf-8") == text, f"{path} is stale: python -m lit_personalize.report.pages"


def test_the_sheet_shows_the_cells() -> None:
    """Row by row: real, base, methods; each tile is a cell's, enlarged twice."""
    science = DOCS / "science"
    _, fingerprint = load_cells(science)
    tiles = np.asarray(Image.open(science / "pictures.png").convert("RGB"))
    rows = [*pages.REFERENCES, *METHODS]
    for column, subject in enumerate(SUBJECTS_FOR_SCIENCE):
        for part, name in enumerate((*METHODS, *pages.REFERENCES)):
            cell = cell_id(name if name in METHODS else "Textual Inversion", subject, SEEDS[0], fingerprint)
            strip = np.asarray(Image.open(science / f"{cell}.png"))
            at = 64 * max(0, part - len(METHODS) + 1)
            top, left = GAP + rows.index(name) * (128 + LINE * LINES + GAP), GAP + column * (128 + GAP)
            assert np.array_equal(tiles[top : top + 128 : 2, left : left + 128 : 2], strip[:, at : at + 64]), (
                f"{name}, {subject} is stale: python -m lit_personalize.report.pages"
            )


@pytest.mark.parametrize(
    ("textual", "verdict"),
    [(0.2, "reproduced"), (0.9, "not reproduced: the opposite"), (0.5, "not reproduced: undecided")],
)
def test_a_verdict_follows_the_interval(textual: float, verdict: str) -> None:
    effect, found = judge(cells_with(Textual=textual), ORDERS[0])
    assert found == verdict
    assert effect.startswith(f"{0.5 - textual:.3f} [")


def test_lower_is_better_for_kid_and_missing_cells_are_said() -> None:
    order = next(o for o in ORDERS if o.lower and o.worse == "DreamBooth-LoRA")
    cells = cells_with(**{"DreamBooth-LoRA": 0.8})
    assert judge(cells, order)[1] == "reproduced"
    assert judge({}, order) == ("missing", "not measured")
    text = pages.overview({k: v for k, v in cells.items() if k[2] == 0}, "0")
    assert f"| Textual Inversion | {len(SUBJECTS_FOR_SCIENCE)}/{len(SUBJECTS_FOR_SCIENCE) * len(SEEDS)} |" in text
    assert "| Textual Inversion | 0/" in pages.overview({}, "0")


def test_cells_without_a_figure_are_left_out_of_its_mean() -> None:
    cells = cells_with(**{"Textual": 0.2})
    for (_, _, seed), row in cells.items():
        if seed == 0:
            del row["CLIP-T"], row["CLIP-T, real"]
    later = {key: row for key, row in cells.items() if key[2] != 0}
    assert pages.column(cells, "Custom Diffusion", "CLIP-T").tolist() == (
        pages.column(later, "Custom Diffusion", "CLIP-I").tolist()
    )
    assert len(pages.column(cells, "Custom Diffusion", "CLIP-I")) == len(SUBJECTS_FOR_SCIENCE) * len(SEEDS)
    assert judge(cells, ORDERS[0]) == judge(later, ORDERS[0])


def test_the_bar_needs_both_shares() -> None:
    assert ": met." in pages.bar(cells_with(**{"DreamBooth-LoRA": 0.95}))
    assert "(DreamBooth-LoRA), over" in pages.bar(cells_with(**{"DreamBooth-LoRA": 0.95}))
    assert ": not met." in pages.bar(cells_with())
    first = {key: row for key, row in cells_with().items() if key[2] == 0}
    assert f"over {len(SUBJECTS_FOR_SCIENCE)} of its {len(SUBJECTS_FOR_SCIENCE) * len(SEEDS)} cells" in pages.bar(first)


def test_memorising_is_nearer_than_real_pictures() -> None:
    text = pages.memorising(cells_with(**{"DreamBooth-LoRA": 0.02, "Textual": 0.06}))  # real pictures: 0.1
    verdicts = {line.split(" | ")[0].lstrip("| "): line.split(" | ")[2].rstrip(" |") for line in text.splitlines()}
    assert verdicts["Custom Diffusion"] == "nearer than real pictures"
    assert verdicts["DreamBooth-LoRA"] == "no" and verdicts["Textual Inversion"] == "no"
    assert "| Textual Inversion | missing | not measured |" in pages.memorising({})


def test_a_page_without_marks_is_named(tmp_path: Path) -> None:
    for name in pages.PAGES.values():
        path = tmp_path / "methods" / f"{name}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text("# a page\n")
    with pytest.raises(DataError, match="custom_diffusion.md lacks the lines"):
        pages.pages(tmp_path, {}, "0")
