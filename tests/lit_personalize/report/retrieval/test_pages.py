"""The page holds the numbers of the results beside it, and verdicts follow from intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lit_personalize.backbones.fingerprint import fingerprint_of
from lit_personalize.report.retrieval import effect, pages
from lit_personalize.report.retrieval.queries import BY, NARROW, asked
from lit_personalize.tinyworld.build import committed_weights

DOCS = Path(__file__).parents[4] / "docs"


def test_the_page_is_current() -> None:
    text = (DOCS / pages.PAGE).read_text(encoding="utf-8")
    assert text == pages.written(DOCS), f"{pages.PAGE} is stale: python -m lit_personalize.report.retrieval.pages"


def test_results_are_of_the_present_queries_recipe_and_encoder() -> None:
    results = json.loads((DOCS / pages.FOLDER / pages.RESULTS).read_text(encoding="utf-8"))
    assert results["pairs"] == 100_000 and results["n"] == 200
    present = [(q.text, q.pictures, [list(fact) for fact in sorted(q.facts)]) for q in asked()]
    assert [(row["text"], row["pictures"], row["asked"]) for row in results["rows"]] == present
    clip = committed_weights() / "retrieval_clip"
    assert fingerprint_of(clip) in results["encoder"]
    cells = effect.load_cells(DOCS / pages.FOLDER)
    assert len(cells) == len(list((DOCS / pages.FOLDER / effect.CELLS).glob("*.json"))), "a cell is of another recipe"
    assert all(cell["encoder"] == effect.caption_tower(clip) for cell in cells.values())


def rows_with(clip: int, substring: int) -> list[dict[str, Any]]:
    return [
        {"group": NARROW[0], "text": f"q{i}", "pictures": by, "relevant": 100, "said": 60,
         "clip": {"found": 50, "hits": clip + i}, "substring": {"found": 40, "hits": substring},
         "words": {"found": 40, "hits": substring - 1}}
        for by in BY for i in range(4)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("clip", "said"), [(30, "reached"), (5, "not reached: the opposite"), (18, "not reached: undecided")]
)
def test_a_claim_follows_the_interval(clip: int, said: str) -> None:
    rows = rows_with(clip, 20)
    assert pages.verdict(rows[:4], "substring", "recall", 50)[1] == said
    difference, _ = pages.verdict(rows[:4], "substring", "precision", 50)
    assert difference.startswith(f"{(clip + 1.5 - 20) / 50:.3f} [")
    assert f"| {said} |" in pages.claims(rows, 50)


def test_queries_that_fail_are_named() -> None:
    told = pages.failing(rows_with(18, 20), 50)
    assert "more in 2 of 4 queries by text, 2 of 4 queries by 1 picture and 2 of 4 queries by 4 pictures." in told
    assert told.endswith("q0 (18, 20); q1 (19, 20).")
    assert pages.failing(rows_with(30, 20), 50).endswith("and 0 of 4 queries by 4 pictures.")


def cells_with(retrieved: float, other: float, count: int = 3) -> effect.Cells:
    found = {}
    for name, value in (("retrieved", retrieved), ("random", other), ("generated", other)):
        for i, subject in enumerate(effect.SUBJECTS):
            for seed in range(count):
                figures = dict.fromkeys(pages.FIGURES, value + i + 0.1 * seed + 0.01 * seed * len(name))
                found[name, subject, seed] = {"set": name, "subject": subject, "pictures": 200, "seconds": 9, **figures}
    return found


def test_effects_are_differences_of_pairs() -> None:
    cells = cells_with(2.0, 5.0)
    table = pages.effects(cells)
    assert "| retrieved less random | 6 pairs | -2.97" in table
    assert f"{pages.KID}, retrieved against random: nearer to the untouched base's with the retrieved set." in (
        pages.effect_verdicts(cells)
    )
    assert "nearer to real pictures with the generated set" in pages.effect_verdicts(cells_with(5.0, 2.0))
    assert pages.effect_verdicts(cells_with(2.0, 2.0)).count("undecided") == 2, "retrieved and generated are alike"
    del cells["random", effect.SUBJECTS[0], 0]
    assert "| retrieved less random | 5 pairs |" in pages.effects(cells)
    assert pages.effect_verdicts(cells).count("open, 5 of 6 pairs are measured") == 2, "a few are no interval"
    assert pages.effect_verdicts({}).count("open, 0 of 6") == 4
