"""Both readers are timed, what is called cold was, and the ratios that the docs name are those that were measured."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM, RESULT = ROOT / "benchmarks/corpus_store.py", ROOT / "benchmarks/corpus_store_cpu.json"
ROWS = {
    "random rows, cold": "512 random rows, no page in memory",
    "random rows, warm": "512 random rows, their pages in memory",
    "full scan, cold": "all rows in order, no page in memory",
    "full scan, warm": "all rows in order, their pages in memory",
}


def test_both_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--rows", "12", "--shard-rows", "5", "--random", "4", "--rounds", "1", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *given])
    runpy.run_path(str(PROGRAM), run_name="__main__")
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["D"], report["shards"]) == (12, 99_648, 3)
    assert all(report[name]["ours s"] > 0 < report[name]["bare s"] for name in ROWS)
    assert not list(tmp_path.iterdir())


def test_a_random_row_costs_at_most_twice_its_bytes() -> None:
    report = json.loads(RESULT.read_text(encoding="utf-8"))
    cold = report["random rows, cold"]
    assert report["rows"] == 4000 and cold["ratio"] <= 2 and cold["pages in memory before"][1] <= 0.01


def test_the_docs_name_the_measured_ratios() -> None:
    report = json.loads(RESULT.read_text(encoding="utf-8"))
    text = (ROOT / "docs/corpus.md").read_text(encoding="utf-8")
    for name, said in ROWS.items():
        ratios = report[name]["ratios of rounds"]
        assert f"| {said} | {report[name]['ratio']:.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f}) |" in text, name
    error = report["largest relative error of a factor"]
    assert f"by rounding was {error:.1e}." in text and f"writes {report['rows']:,} rows of {report['D']:,}" in text
