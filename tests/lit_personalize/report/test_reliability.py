"""The page of crashes says what was recorded, and what was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lit_personalize.report.reliability import CRASHES, reliability_tables

ABOUT = {"processor": "CPU", "cores": 2, "torch": "2", "date": "2026-01-01", "commit": "abc"}


def trial(**changed: Any) -> dict[str, Any]:
    kill = {"kind": "save", "rank": 0, "stage": "filling", "step": 5, "found": 4, "codes": [-9, 1], "others": 0.5,
            "untrue": []}  # fmt: skip
    stop = {"rank": 0, "step": 7, "durable": 0.25, "ended": 0.5, "codes": [75, 75]}
    return {"ranks": 2, "workers": 0, "kills": [kill], "stop": stop, "codes": [0, 0], "same export": True,
            "same state": True, "leftovers": [], "lost": 0, "doubled": 0, "other": 0, "steps trained": 15,
            "steps that count": 12, **changed}  # fmt: skip


def test_counts_are_those_of_the_record(tmp_path: Path) -> None:
    trials = [trial(), trial(lost=3, codes=[0, 1]), trial(**{"same state": False, "stop": None})]
    report = {"circumstances": ABOUT, "steps": 12, "every": 3, "trials": trials,
              "undisturbed": {"2": {"seconds of a step": 0.2}}}  # fmt: skip
    (tmp_path / CRASHES).write_text(json.dumps(report))
    text = reliability_tables(tmp_path)
    for line in (
        "3 runs of 12 steps with a save every 3, 3 of them on two ranks",
        "3 times SIGKILL to a process of them, 3 aimed at saves, of which 3 met one before its end",
        "| runs that could not go on | 1 |", "by a bit | 1 |", "| 3, 0, 0 |", "(goodput) | 80% |",
        "| steps trained again after a kill | median 1, most 1 of at most 3 |",
        "| in a stage of a save | 3 | 3 | 0 | 3 | 0 | 0 | 0 |",
        "2 times USR2 to one rank alone, 2 times of two: 2 times all ranks saved",
        "| median 0.25, most 0.25 |",
        "`slurm_faults.json`: not measured.", "`save_cost_cpu.json`: not measured.",
    ):  # fmt: skip
        assert line in text, f"{line}\n{text}"
