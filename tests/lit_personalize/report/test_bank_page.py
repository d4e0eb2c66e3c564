"""What the page of the bank says is what its benchmarks recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lit_personalize.report.bank_page import HOURS, RUNS, SPEED, bank_tables


def test_the_page_says_what_was_recorded_and_what_was_not(tmp_path: Path) -> None:
    assert bank_tables(tmp_path).count("Not measured yet") == 2
    about = {"date": "2026-01-01", "commit": "abc", "cores": 2, "threads": 1}
    ways = {"a process for each": 40.0, "one after the other": 20.04, "bank": 10.0}
    (tmp_path / RUNS).write_text(json.dumps({
        **about, "slots": 32, "steps": 200, "adapters with a process for each": 3, "adapters one after the other": 8,
        "seconds per adapter": [ways, {**ways, "bank": 11.0}], "start-up": 2.0, "batching": 1.9, "together": 3.8,
    }))  # fmt: skip
    result = {
        "slots": 32, "samples per adapter step": 2, "trainer ms per adapter step": 120.0, "limit": 2.2, "ratio": 1.9,
        "bank ms per adapter step": 60.0, "base ms per adapter step, trainer's batch": 110.0,
        "base ms per adapter step, bank's batch": 50.0, "share of the limit": 0.84,
    }  # fmt: skip
    (tmp_path / SPEED).write_text(json.dumps({**about, "result": result}))
    text = bank_tables(tmp_path)
    for line in (
        "| bank | 10.0 | 11.0 |", "| one after the other | 20.0 | 20.0 |", "start-up 2.0 times, batching 1.9",
        "84% of the limit; the goal of 85% is not reached", "| frozen base, the bank's batch | 50.0 |",
    ):  # fmt: skip
        assert line in text, f"{line}\n{text}"
    (tmp_path / SPEED).write_text(json.dumps({**about, "result": {**result, "share of the limit": 0.85}}))
    assert "85% is reached" in bank_tables(tmp_path)


def test_a_gpu_has_its_table_and_what_is_extrapolated_is_called_so(tmp_path: Path) -> None:
    benchmarks = tmp_path / "benchmarks"
    benchmarks.mkdir()
    assert "No figure of a GPU has been measured yet" in bank_tables(benchmarks)
    way: dict[str, Any] = {
        "seconds per adapter's step": 0.0105, "peak GB": 61.24, "extrapolated seconds per adapter": 8.4,
        "extrapolated adapters per hour": 428.6, "extrapolated GPU-hours of the corpus": 151.6,
        "target reached": True, "times the limit": 2.33,
        "where those hours go": {"attention": 30.0, "idle": 41.62, "start-up": 0.0},
    }  # fmt: skip
    slow = {**way, "extrapolated seconds per adapter": 22.2, "target reached": False, "times the limit": None}
    path = tmp_path / HOURS.replace("*", "GPU")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({
        "device": "GPU", "date": "2026-01-01", "commit": "abc", "base": "B", "recipe": "R", "steps of an adapter": 800,
        "adapters of the corpus": 64974, "timed steps of a process": 50, "failed": {"bank 1": "fell"},
        "stopped": {"bank 64": "out of memory"}, "summary": {
            "limit, modelled": {"GPU-hours": 65.04}, "target seconds per adapter": 9.0,
            "ways": {"bank 32": way, "stock": {**slow, "where those hours go": {}}},
        },
    }))  # fmt: skip
    text = bank_tables(benchmarks)
    for line in (
        "| bank 32 | 10.5 | 61.2 | 8.4 * | 429 | 151.6 | 2.33 | idle 41.6, attention 30.0 |",
        "| 22.2 | 429 | 151.6 | not counted | not profiled |", "| bank 64 | out of memory |", "| bank 1 | fell |",
        "hours of 64,974 adapters are extrapolated from 50 timed steps", "bf16 is 65.0 GPU-hours",
    ):  # fmt: skip
        assert line in text, f"{line}\n{text}"
    assert "No figure of a GPU" not in text
