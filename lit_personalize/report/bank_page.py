"""The measured part of docs/bank.md, from what benchmarks/bank_speed.py and bank_runs.py recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SPEED, RUNS = "bank_speed_cpu.json", "bank_runs_cpu.json"
SHARE = 0.85
"""Of its limit, that a bank should reach."""


def bank_tables(benchmarks: Path) -> str:
    """Both tables; what is not recorded is said to be missing."""
    parts = []
    for name, section, command in ((RUNS, _runs, "bank_runs.py"), (SPEED, _speed, "bank_speed.py")):
        path = benchmarks / name
        if path.exists():
            parts.append(section(json.loads(path.read_text(encoding="utf-8"))))
        else:
            parts.append(f"Not measured yet: `python benchmarks/{command}`.")
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
