"""The arithmetic for LAION-400M: that of the docs is computed, and its rates can be measured again."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM, RATES = ROOT / "benchmarks/laion_400m.py", ROOT / "benchmarks/laion_400m_cpu.json"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *arguments])
    runpy.run_path(str(PROGRAM), run_name="__main__")


def test_the_table_of_the_docs_is_computed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "--from", str(RATES))
    table = capsys.readouterr().out.strip()
    assert "core-hours" in table and table in (ROOT / "docs/retrieval.md").read_text(encoding="utf-8")


def test_rates_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ("--layers", "1", "--samples", "20", "--vectors", "2000", "--rounds", "1")
    run(monkeypatch, *tiny, "--out", str(tmp_path / "rates.json"))
    rates, known = (json.loads(path.read_text()) for path in (tmp_path / "rates.json", RATES))
    assert rates.keys() == known.keys() and "core-hours" in capsys.readouterr().out
    assert rates["captions_per_second"]["16"] > rates["captions_per_second"]["77"] > 0
    read = rates["seconds_per_10000"]
    assert 0 < read["touched"] < 1 and read["headers"] > 0 and read["bytes_per_sample"] > 22_000
