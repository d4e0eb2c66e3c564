"""A cell of combined concepts runs from pictures to figures of every way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lit_personalize.report import combinations, measures
from lit_personalize.report.combinations import COMBINATIONS, SUBJECT_IN_STYLE, TWO_SUBJECTS, WAYS, run_combination
from lit_personalize.tinyworld.build import committed_weights


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(COMBINATIONS))
def test_every_way_is_measured(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combinations, "OPTIONS", replace(measures.OPTIONS, steps=2))
    pair = "olive-zigzag-heart + posterized" if kind == SUBJECT_IN_STYLE else COMBINATIONS[TWO_SUBJECTS][0]
    found = run_combination(kind, pair, 0, committed_weights(), tmp_path, 1)
    ways = ("real", "base", *WAYS[kind])
    assert found["shown"].shape == (64, 64 * len(ways), 3)
    for way in ways:
        figures = {name: value for name, value in found.items() if name.startswith(f"{way}: ")}
        assert len(figures) >= 6 and all(-1 <= value <= 1 for value in figures.values()), figures
    best = "both colours" if kind == TWO_SUBJECTS else "both"
    assert found[f"real: {best}"] > 0.3 and found[f"base: {best}"] < 0.2
    if kind == SUBJECT_IN_STYLE:  # the plain sum is drawn otherwise than either part alone
        assert len({found[f"{way}: CLIP-T"] for way in ("addition", "subject alone", "style alone")}) == 3
