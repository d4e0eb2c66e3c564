"""The measured part of docs/reliability.md, from what two benchmarks and the tests on a real Slurm have recorded."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CRASHES, SLURM, SAVES = "crashes_cpu.json", "slurm_faults.json", "save_cost_cpu.json"
STAGES = ("staged", "filling", "flushing and hashing", "marked", "renamed, pruning")
"""Of a save, in their order."""
KINDS = {
    "time": "at a moment of the start, all equally likely",
    "save": "in a stage of a save",
    "notice": "in a stage of the save that a notice asked for: a lead that was too short",
}
EVENTS = {
    "preempted": "a job of higher priority takes the cores of some runs of an array",
    "rest of the array": "the others of the array",
    "high priority": "the job of higher priority",
    "time limit": "a notice before the time limit",
    "lost node": "all processes of the node are gone, its slurmd among them",
}


def reliability_tables(benchmarks: Path) -> str:
    """The measured part of the page; what is not recorded is said to be missing."""
    parts = []
    for name, section in ((CRASHES, _crashes), (SLURM, _slurm), (SAVES, _saves)):
        path = benchmarks / name
        parts.append(
            section(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else f"`{name}`: not measured."
        )
    return "\n\n".join(parts)


def _crashes(report: dict[str, Any]) -> str:
    trials = report["trials"]
    kills = [kill for trial in trials for kill in trial["kills"]]
    rows = {text: [k for k in kills if k["kind"] == kind] for kind, text in KINDS.items()}
    wrong = [t for t in trials if not (t["same export"] and t["same state"])]
    unusable = [t for t in trials if any(t["codes"])]
    differences = ", ".join(str(sum(t[name] for t in trials)) for name in ("lost", "doubled", "other"))
    again = _spread([k["step"] - k["found"] for k in kills], f"of at most {report['every']}")
    goodput = sum(t["steps that count"] for t in trials) / sum(t["steps trained"] for t in trials)
    lines = [
        f"**Killed trainings.** {len(trials)} runs of {report['steps']} steps with a save every {report['every']}, "
        f"{sum(t['ranks'] > 1 for t in trials)} of them on two ranks, {sum(t['workers'] > 0 for t in trials)} with "
        f"loader workers; {len(kills)} times SIGKILL to a process of them, {sum(k['kind'] != 'time' for k in kills)} "
        f"aimed at saves, of which {sum(k['stage'] in STAGES for k in kills)} met one before its end. "
        f"{_where(report['circumstances'])}.",
        "",
        "| of these kills and runs | |",
        "| --- | --- |",
        f"| runs that could not go on | {len(unusable)} |",
        f"| runs that ended with another adapter, optimizer state or average, by a bit | {len(wrong)} |",
        f"| samples lost, doubled, or shown at another step | {differences} |",
        f"| checkpoints marked COMPLETE that were not whole, after any kill | {sum(len(k['untrue']) for k in kills)} |",
        f"| leftovers of killed saves at the end | {sum(len(t['leftovers']) for t in trials)} |",
        f"| steps trained again after a kill | {again} |",
        f"| steps that count, of all that were trained (goodput) | {goodput:.0%} |",
    ]
    others = [kill["others"] for kill in kills if len(kill["codes"]) > 1]
    if others:
        lines.append(f"| seconds until the other rank had ended | {_spread(others)} |")
    lines += ["", f"| killed | times | of two ranks | {' | '.join(STAGES)} |"]
    lines += ["| --- |" + " --- |" * (len(STAGES) + 2)]
    for text, found in rows.items():
        stages = Counter(kill["stage"] for kill in found)
        two = sum(len(kill["codes"]) > 1 for kill in found)
        counts = " | ".join(str(stages[stage]) if text != KINDS["time"] else "" for stage in STAGES)
        lines.append(f"| {text} | {len(found)} | {two} | {counts} |")
    lines += ["", "The stage is what was on the disk when the process was gone; all other saves had just been done."]
    stops = [trial["stop"] for trial in trials if trial["stop"]]
    agreed = sum(set(stop["codes"]) == {75} for stop in stops)
    of_two = sum(len(stop["codes"]) > 1 for stop in stops)
    step = " and ".join(f"{of['seconds of a step']:.2f} s on {n}" for n, of in sorted(report["undisturbed"].items()))
    lines += [
        "",
        f"**Notices.** {len(stops)} times USR2 to one rank alone, {of_two} times of two: {agreed} times all ranks "
        f"saved together and ended with 75. A step took {step} rank(s).",
        "",
        "| from the signal | seconds |",
        "| --- | --- |",
        f"| to the checkpoint, flushed, hashed and renamed | {_spread([stop['durable'] for stop in stops])} |",
        f"| to the end of all processes | {_spread([stop['ended'] for stop in stops])} |",
    ]
    return "\n".join(lines)


def _slurm(report: dict[str, Any]) -> str:
    lines = [
        "**A real Slurm** of four nodes on one machine, recorded by `tests/slurm/lit_slurm/test_faults.py` in "
        f"{report['seconds']} s ({_where(report['circumstances'])}):",
        "",
        "| what happened | to runs | that ended with other weights |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {text} | {report['runs'][what]} | {report['other weights'][what]} |" for what, text in EVENTS.items()]
    spent = _spread(report["seconds from notice to durable"])
    return "\n".join([*lines, "", f"Seconds from the notice in the process to the checkpoint: {spent}."])


def _saves(report: dict[str, Any]) -> str:
    adapter, size = report["adapter bytes"], report["checkpoint bytes"]
    return (
        f"**A save** of the recipe lora/tinyworld holds back the training for {report['steps that a save takes']:.2f} "
        f"steps ({1000 * report['seconds of a save']:.0f} ms; {report['saves']} saves; "
        f"{_where(report['circumstances'])}). The checkpoint has {size:,} bytes, {size / adapter:.2f} times the "
        f"adapter's {adapter:,}."
    )


def _spread(values: Sequence[float], more: str = "") -> str:
    if not values:
        return "missing"
    text = f"median {statistics.median(values):.3g}, most {max(values):.3g}"
    return f"{text} {more}" if more else text


def _where(about: dict[str, Any]) -> str:
    machine = f"{about['processor']}, {about['cores']} cores, torch {about['torch']}"
    return f"{machine}, {about['date']}, commit {about['commit']}"
