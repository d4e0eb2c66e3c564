"""Both trainings take their turns, and the factors that the docs name are those that were measured."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM, RESULT = ROOT / "benchmarks/warm_cache.py", ROOT / "benchmarks/warm_cache_cpu.json"


def test_both_are_timed(tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), "--steps", "1", "--rounds", "2", "--base", str(tiny_base)])
    runpy.run_path(str(PROGRAM), run_name="__main__")
    report = json.loads(capsys.readouterr().out)
    for batch in ("batch 1", "batch 4"):
        assert len(report[batch]["ratios of rounds"]) == 2 and report[batch]["warm ms per step"] > 0


def test_the_docs_name_the_measured_factors() -> None:
    report = json.loads(RESULT.read_text(encoding="utf-8"))
    said = " ".join((ROOT / "docs/retrieval.md").read_text(encoding="utf-8").split())
    for batch, pictures in (("batch 1", "one picture a batch"), ("batch 4", "four")):
        ratios = report[batch]["ratios of rounds"]
        factor, spread = f"{report[batch]['ratio']:.2f} times", f"(rounds from {ratios[0]:.2f} to {ratios[-1]:.2f})"
        assert any(f"{factor}{more} with {pictures} {spread}" in said for more in ("", " as fast")), batch
