"""The measured part of docs/bank.md, from what benchmarks/bank_speed.py, bank_runs.py and bank_hours.py recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SPEED, RUNS = "bank_speed_cpu.json", "bank_runs_cpu.json"
HOURS = "kernels/benchmarks/results/*/bank_hours.json"
"""Of every GPU, from the repository's root."""
SHARE = 0.85
"""Of its limit, that a bank should reach."""


def bank_tables(benchmarks: Path) -> str:
    """All tables; what is not recorded is said to be missing."""
    parts = []
    for name, section, command in ((RUNS, _runs, "bank_runs.py"), (SPEED, _speed, "bank_speed.py")):
        path = benchmarks / name
        if path.exists():
            parts.append(section(json.loads(path.read_text(encoding="utf-8"))))
        else:
            parts.append(f"Not measured yet: `python benchmarks/{command}`.")
    gpus = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(benchmarks.parent.glob(HOURS))]
    parts += map(_hours, gpus) if gpus else ["No figure of a GPU has been measured yet: `benchmarks/bank_hours.py`."]
    return "\n\n".join(parts)


def _where(found: Mapping[str, Any]) -> str:
    threads = f"{found['threads']} thread{'s' * (found['threads'] > 1)} on {found['cores']} cores"
    return f"{found['date']}, commit {found['commit']}, {threads}"


def _runs(found: Mapping[str, Any]) -> str:
    rounds = found["seconds per adapter"]
    rows = [f"| {name} | {' | '.join(f'{each[name]:.1f}' for each in rounds)} |" for name in rounds[0]]
    gains = f"start-up {found['start-up']:.1f} times, batching {found['batching']:.1f} times, together"
    return "\n".join([
        f"Seconds per adapter of {found['steps']} steps by the program's own commands, in turns ({_where(found)}): "
        f"`litp fit` for each of {found['adapters with a process for each']} adapters, "
        f"{found['adapters one after the other']} one after the other in a process, a bank of {found['slots']}. The "
        f"gain: {gains} {found['together']:.1f}.",
        "", "| way | " + " | ".join(f"round {n + 1}" for n in range(len(rounds))) + " |",
        "| --- |" + " --- |" * len(rounds), *rows,
    ])  # fmt: skip


def _speed(found: Mapping[str, Any]) -> str:
    result = found["result"]
    share = result["share of the limit"]
    said = "reached" if share >= SHARE else "not reached"
    rows = [
        f"| {name} | {result[f'{key}']:.1f} |"
        for name, key in (
            ("trainer", "trainer ms per adapter step"), ("bank", "bank ms per adapter step"),
            ("frozen base, the trainer's batch", "base ms per adapter step, trainer's batch"),
            ("frozen base, the bank's batch", "base ms per adapter step, bank's batch"),
        )
    ]  # fmt: skip
    return "\n".join([
        f"Milliseconds of an adapter's step of {result['samples per adapter step']} samples, a bank of "
        f"{result['slots']}, no start-up and no files ({_where(found)}). The bank gains {result['ratio']:.2f} times, "
        f"the frozen base alone {result['limit']:.2f} times by the larger batch: {share:.0%} of the limit; the goal of "
        f"{SHARE:.0%} is {said}.",
        "", "| | ms |", "| --- | --- |", *rows,
    ])  # fmt: skip


def _hours(found: Mapping[str, Any]) -> str:
    summary, steps = found["summary"], found["steps of an adapter"]
    limit, target = summary["limit, modelled"]["GPU-hours"], summary["target seconds per adapter"]
    rows = []
    for name, way in summary["ways"].items():
        step, times, hours = (way[k] for k in ("seconds per adapter's step", "times the limit", "where those hours go"))
        parts = ", ".join(f"{kind} {hours[kind]:.1f}" for kind in sorted(hours, key=lambda k: -hours[k]) if hours[kind])
        cells = (
            f"{1e3 * step:.1f}", f"{way['peak GB']:.1f}",
            f"{way['extrapolated seconds per adapter']:.1f}{' *' if way['target reached'] else ''}",
            f"{way['extrapolated adapters per hour']:.0f}", f"{way['extrapolated GPU-hours of the corpus']:.1f}",
            "not counted" if times is None else f"{times:.2f}", parts or "not profiled",
        )  # fmt: skip
        rows.append(f"| {name} | {' | '.join(cells)} |")
    rows += [f"| {name} | {why} |" + " |" * 6 for name, why in {**found["stopped"], **found["failed"]}.items()]
    modelled = "" if limit is None else f" The modelled limit of an H200's bf16 is {limit:.1f} GPU-hours."
    return "\n".join([
        f"{found.get('device', 'No device')}, base {found['base']}, recipe `{found['recipe']}` ({found['date']}, "
        f"commit {found['commit']}). Steps and memory are measured; seconds per adapter of {steps} steps (* at most "
        f"{target:g}), adapters per hour, and hours of {found['adapters of the corpus']:,} adapters are extrapolated "
        f"from {found['timed steps of a process']} timed steps of each process.{modelled}",
        "",
        "| way | ms, adapter's step | peak GB | s per adapter | adapters per hour | GPU-hours | times the limit "
        "| where those hours go |",
        "| --- |" + " --- |" * 7, *rows,
    ])  # fmt: skip
