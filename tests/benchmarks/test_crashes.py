"""Real trainings, killed at seeded moments, end as if nothing had happened; and the harness would see it if not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import crashes
from killable_runs import untrue
from sample_ledger import Start, compare, counted

from lit_personalize import checkpoints


@pytest.mark.timeout(600)
def test_eight_kills(tmp_path: Path) -> None:
    """Six of one rank, with and without loader workers, and two of one of two ranks; about half within saves."""
    report = crashes.measure(8, tmp_path / "crashes.json", jobs=3)
    trials = report["trials"]
    for trial in trials:
        assert not crashes.verdict(trial), f"seed {trial['seed']}: {crashes.verdict(trial)}"
    kills = [kill for trial in trials for kill in trial["kills"]]
    assert len(kills) == 8 and sum(kill["kind"] != "time" for kill in kills) >= 4
    assert sum(len(kill["codes"]) == 2 for kill in kills) == 2 and all(-9 in kill["codes"] for kill in kills)
    stops = [trial["stop"]["codes"] for trial in trials if trial["stop"]]
    assert all(codes in ([75], [75, 75]) for codes in stops)
    assert json.loads((tmp_path / "crashes.json").read_text())["trials"] == trials


def ledger(*parts: tuple[int, range]) -> list[Start]:
    """Starts from a step, and the steps that each of them ended."""
    return [Start(at, [(step, ((0, f"picture-{step}"),)) for step in steps], []) for at, steps in parts]


def test_what_counts() -> None:
    """Steps 5 to 7 were lost with their state and trained again."""
    whole = ledger((0, range(1, 11)))
    killed = ledger((0, range(1, 8)), (4, range(5, 11)))
    assert [step for step, _ in counted(killed)] == list(range(1, 11))
    assert compare(killed, whole) == {"lost": 0, "doubled": 0, "other": 0}
    assert compare(ledger((0, range(1, 8)), (5, range(7, 11))), whole) == {"lost": 1, "doubled": 0, "other": 0}
    assert compare(ledger((0, range(1, 8)), (5, range(5, 11))), whole) == {"lost": 0, "doubled": 1, "other": 0}
    killed[1].shown[0] = (5, ((0, "picture-9"),))
    assert compare(killed, whole) == {"lost": 1, "doubled": 1, "other": 1}


def good() -> dict[str, Any]:
    return {"same export": True, "same state": True, "lost": 0, "doubled": 0, "other": 0, "leftovers": [],
            "codes": [0], "stop": {"codes": [75, 75]}, "kills": [{"untrue": []}]}  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        {"same export": False}, {"same state": False}, {"lost": 1}, {"doubled": 1}, {"other": 1}, {"codes": [0, 1]},
        {"leftovers": [".tmp-step-00000004"]}, {"stop": {"codes": [75, 1]}}, {"kills": [{"untrue": ["step-4: half"]}]},
    ],
)  # fmt: skip
def test_every_fault_is_a_verdict(changed: dict[str, Any]) -> None:
    assert not crashes.verdict(good()) and crashes.verdict({**good(), "stop": None}) == []
    assert crashes.verdict({**good(), **changed})


def test_a_mark_that_is_not_true_is_seen(tmp_path: Path) -> None:
    checkpoints.publish(tmp_path, 4, lambda folder: (folder / checkpoints.STATE).write_bytes(b"state") and None)
    assert untrue(tmp_path) == []
    staged = checkpoints.staged(tmp_path, 8)
    checkpoints.directory(tmp_path, 4).rename(staged)
    assert untrue(tmp_path) == []
    (staged / checkpoints.STATE).write_bytes(b"stale")
    assert untrue(tmp_path) == [".tmp-step-00000008: state.ckpt has another sha256"]
    staged.rename(checkpoints.directory(tmp_path, 4))
    assert untrue(tmp_path) == ["step-00000004: state.ckpt has another sha256"]
