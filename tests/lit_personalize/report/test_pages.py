"""Numbers in docs are those of the cells beside them, and verdicts follow from intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lit_personalize.errors import DataError
from lit_personalize.report import combination_tables, pages, sheets, tables
from lit_personalize.report.combinations import COMBINATIONS, SUBJECT_IN_STYLE, TWO_SUBJECTS, WAYS
from lit_personalize.report.science import METHODS, SEEDS, STYLE_METHODS, cell_id, load_cells
from lit_personalize.report.tables import ORDERS, judge
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
                row = {name: value for name in tables.COLUMNS}
                row |= {f"{name}, {s}": 0.1 for name in tables.COLUMNS for s in ("real", "base")}
                found[method, subject, seed] = {**row, "seconds": 60}
    return found


def test_every_page_is_current() -> None:
    cells, fingerprint = load_cells(DOCS / "science")
    for path, text in pages.pages(DOCS, cells, fingerprint).items():
        assert path.read_text(encoding="utf-8") == text, f"{path} is stale: python -m lit_personalize.report.pages"


@pytest.mark.parametrize("name", list(sheets.SHEETS))
def test_a_sheet_shows_the_cells(name: str) -> None:
    """Row by row: real, base, methods; each tile is a cell's, enlarged twice, and gray where that is missing."""
    science, (learned, methods) = DOCS / "science", sheets.SHEETS[name]
    _, fingerprint = load_cells(science)
    path = science / f"{name}.png"
    shown = np.asarray(Image.open(path).convert("RGB")) if path.exists() else None
    places = {(m, of): science / f"{cell_id(m, of, SEEDS[0], fingerprint)}.png" for m in methods for of in learned}
    assert (shown is not None) == any(place.exists() for place in places.values())
    for column, of in enumerate(learned if shown is not None else ()):
        present = [m for m in methods if places[m, of].exists()]
        for row, label in enumerate((*sheets.REFERENCES, *methods)):
            source, at = (label, 0) if label in methods else (present[0] if present else "", 64 * (row + 1))
            tile = np.full((64, 64, 3), 128, np.uint8)
            if source in present:
                tile = np.asarray(Image.open(places[source, of]))[:, at : at + 64]
            top, left = GAP + row * (128 + LINE * LINES + GAP), GAP + column * (128 + GAP)
            assert shown is not None and np.array_equal(shown[top : top + 128 : 2, left : left + 128 : 2], tile), (
                f"{label}, {of} is stale: python -m lit_personalize.report.pages"
            )


@pytest.mark.parametrize("kind", list(COMBINATIONS))
def test_a_sheet_of_combinations_shows_the_cells(kind: str) -> None:
    science, name = DOCS / "science", f"{kind.replace(' ', '_')}.png"
    _, fingerprint = load_cells(science)
    places = [science / f"{cell_id(kind, pair, SEEDS[0], fingerprint)}.png" for pair in COMBINATIONS[kind]]
    assert (science / name).exists() == any(place.exists() for place in places)
    for column, place in enumerate(places):
        if not place.exists():
            continue
        shown, strip = (np.asarray(Image.open(path).convert("RGB")) for path in (science / name, place))
        for row in range(len((*sheets.REFERENCES, *WAYS[kind]))):
            top, left = GAP + row * (128 + LINE * LINES + GAP), GAP + column * (128 + GAP)
            assert np.array_equal(
                shown[top : top + 128 : 2, left : left + 128 : 2], strip[:, 64 * row : 64 * (row + 1)]
            ), f"{kind} is stale: python -m lit_personalize.report.pages"


@pytest.mark.parametrize(
    ("textual", "verdict"),
    [(0.2, "reproduced"), (0.9, "not reproduced: the opposite"), (0.5, "not reproduced: undecided")],
)
def test_a_verdict_follows_the_interval(textual: float, verdict: str) -> None:
    effect, found = judge(cells_with(Textual=textual), ORDERS[0])
    assert found == verdict
    assert effect.startswith(f"{0.5 - textual:.3f} [")


def test_lower_is_better_for_kid_and_missing_cells_are_said() -> None:
    order = next(o for o in ORDERS if o.lower and o.worse == "DreamBooth")
    cells = cells_with(DreamBooth=0.8)
    assert judge(cells, order)[1] == "reproduced"
    assert judge({}, order) == ("missing", "not measured")
    text = pages.overview({k: v for k, v in cells.items() if k[2] == 0}, "0", None)
    assert f"| Textual Inversion | {len(SUBJECTS_FOR_SCIENCE)}/{len(SUBJECTS_FOR_SCIENCE) * len(SEEDS)} |" in text
    assert "| Textual Inversion | 0/" in pages.overview({}, "0", None)


def test_cells_without_a_figure_are_left_out_of_its_mean() -> None:
    cells = cells_with(**{"Textual": 0.2})
    for (_, _, seed), row in cells.items():
        if seed == 0:
            del row["CLIP-T"], row["CLIP-T, real"]
    later = {key: row for key, row in cells.items() if key[2] != 0}
    assert tables.column(cells, "Custom Diffusion", "CLIP-T").tolist() == (
        tables.column(later, "Custom Diffusion", "CLIP-I").tolist()
    )
    assert len(tables.column(cells, "Custom Diffusion", "CLIP-I")) == len(SUBJECTS_FOR_SCIENCE) * len(SEEDS)
    assert judge(cells, ORDERS[0]) == judge(later, ORDERS[0])


def test_the_bar_needs_both_shares() -> None:
    assert ": met." in pages.bar(cells_with(**{"DreamBooth-LoRA": 0.95}))
    assert "(DreamBooth-LoRA), over its 18 cells" in pages.bar(cells_with(**{"DreamBooth-LoRA": 0.95}))
    assert ": not met." in pages.bar(cells_with())
    first = {key: row for key, row in cells_with().items() if key[2] == 0}
    assert "no method has all" in pages.bar(first)


def test_memorising_is_nearer_than_real_pictures() -> None:
    text = tables.memorising(cells_with(**{"DreamBooth-LoRA": 0.02, "Textual": 0.06}))  # real pictures: 0.1
    verdicts = {line.split(" | ")[0].lstrip("| "): line.split(" | ")[2].rstrip(" |") for line in text.splitlines()}
    assert verdicts["Custom Diffusion"] == "nearer than real pictures"
    assert verdicts["DreamBooth-LoRA"] == "no" and verdicts["Textual Inversion"] == "no"
    assert "| Textual Inversion | missing | not measured |" in tables.memorising({})


def test_a_page_without_marks_is_named(tmp_path: Path) -> None:
    for name in pages.PAGES.values():
        path = tmp_path / "methods" / f"{name}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text("# a page\n")
    with pytest.raises(DataError, match="custom_diffusion.md lacks the lines"):
        pages.pages(tmp_path, {}, "0")


def test_subjects_and_styles_are_not_mixed() -> None:
    cells = cells_with()
    cells |= {("LoRA", "blueprint", seed): {"style": 0.25, "CLIP-I": 9.0} for seed in SEEDS}
    assert "9.000" not in tables.table(cells)
    [row] = [line for line in tables.style_table(cells).splitlines() if line.startswith("| LoRA |")]
    assert "| 3/12 | 0.250 [0.250, 0.250] | missing |" in row
    assert len(tables.style_table(cells).splitlines()) == 2 + len(STYLE_METHODS)


def combined(kind: str, **of_way: float) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Every cell of a kind, each figure the way's number plus the same noise per pair and seed."""
    found = {}
    columns = combination_tables.PAIR_COLUMNS if kind == TWO_SUBJECTS else combination_tables.STYLED_COLUMNS
    for i, pair in enumerate(COMBINATIONS[kind]):
        for seed in SEEDS:
            row = {f"{way}: {name}": of_way.get(way.replace(" ", "_").replace("-", "_"), 0.5) + 0.01 * i + 0.003 * seed
                   for way in (*combination_tables.REFERENCES, *WAYS[kind]) for name in columns}  # fmt: skip
            row |= {f"{way}: {name}, subject {n} of 2": 0.2 * n for way in ("alone", *WAYS[kind])
                    for name in combination_tables.SINGLE for n in (1, 2)}  # fmt: skip
            found[kind, pair, seed] = row
    return found


def test_ways_of_combining_are_compared_pair_by_pair() -> None:
    cells = combined(TWO_SUBJECTS, joint=0.7, closed_form=0.6, addition=0.6)
    text = combination_tables.claims(cells, TWO_SUBJECTS)
    said = {line.split(" | ")[0].lstrip("| "): line.split(" | ")[-1].rstrip(" |") for line in text.splitlines()}
    assert said["both colours: joint above sequential"] == "reproduced"
    assert said["both colours: sequential above closed form"] == "not reproduced: the opposite"
    assert said["both colours: closed form above addition"] == tables.UNDECIDED
    rows = combination_tables.way_table(cells, TWO_SUBJECTS)
    assert "9 of 9 cells." in rows
    [alone] = [line for line in rows.splitlines() if line.startswith("| each adapter")]
    assert alone.endswith("| 0.300 [0.300, 0.300] | 0.300 [0.300, 0.300] |"), "the mean of both subjects by themselves"
    assert combination_tables.claims({}, SUBJECT_IN_STYLE).count("| missing | not measured |") == 7


def test_costs_are_shown_as_measured() -> None:
    row = {"trained parameters": 143488, "steps per second": 3.25, "speed ratio": 0.5, "peak bytes": 2**30,
           "file bytes": 975952}  # fmt: skip
    text = tables.cost_table({"methods": {"LoRA": row}}, ("LoRA", "OFT"))
    assert "| LoRA | 143,488 | 3.25 | 0.50 | 1024 | 953 |" in text
    assert "| OFT | missing | missing | missing | missing | missing |" in text
