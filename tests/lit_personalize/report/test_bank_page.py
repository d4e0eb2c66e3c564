"""What the page of the bank says is what the two benchmarks recorded."""

from __future__ import annotations

import json
from pathlib import Path

from lit_personalize.report.bank_page import RUNS, SPEED, bank_tables


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
