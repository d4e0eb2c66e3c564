"""A ledger of the samples of every step, kept outside of the run, and what it says of a run that was killed often.

Each rank adds a line per start and per step. A step counts if no later start went back behind it.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


class SampleLedger(pl.Callback):
    """Write `folder/rank-R.jsonl`, a line at a time, so that a kill leaves whole lines.

    Args:
        folder: Where the lines go.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._add(trainer, start=trainer.global_step, pid=os.getpid())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The optimizer has stepped, and nothing is saved yet."""
        shown = [list(pair) for pair in zip(batch.position.tolist(), batch.sample_id, strict=True)]
        self._add(trainer, step=trainer.global_step, shown=shown)

    def _add(self, trainer: pl.Trainer, **what: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps({**what, "time": time.monotonic()}) + "\n"
        descriptor = os.open(
            self.folder / f"rank-{trainer.global_rank}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644
        )
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


Shown = tuple[tuple[int, str], ...]
"""Positions in the batch and sample ids of one step."""


@dataclass(frozen=True)
class Start:
    """One start of a run, as a rank saw it."""

    step: int
    """From which it went on."""
    shown: list[tuple[int, Shown]]
    """What each of its steps was shown."""
    times: list[float]
    """When training began and each step ended, in seconds of the monotonic clock."""


def starts(folder: Path, rank: int) -> list[Start]:
    """All starts of a rank that came as far as training."""
    path, found = folder / f"rank-{rank}.jsonl", list[Start]()
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        entry = json.loads(line)
        if "start" in entry:
            found.append(Start(entry["start"], [], [entry["time"]]))
        else:
            shown = tuple((int(position), str(name)) for position, name in entry["shown"])
            found[-1].shown.append((entry["step"], shown))
            found[-1].times.append(entry["time"])
    return found


def counted(of_rank: list[Start]) -> list[tuple[int, Shown]]:
    """Steps and samples of which the state is that of the end of the run, in their order."""
    ends = [start.step for start in of_rank[1:]] + [None]
    return [
        (step, shown)
        for start, end in zip(of_rank, ends, strict=True)
        for step, shown in start.shown
        if end is None or step <= end
    ]


def compare(ours: list[Start], undisturbed: list[Start]) -> dict[str, int]:
    """Samples "lost" and "doubled" among the steps that count, and "other": steps, counted or not, shown others.

    Samples are told apart by the step that shows them, as an epoch later the same one is to be seen again.
    """
    wanted = dict(counted(undisturbed))
    have = Counter((step, *sample) for step, shown in counted(ours) for sample in shown)
    want = Counter((step, *sample) for step, shown in wanted.items() for sample in shown)
    return {
        "lost": sum((want - have).values()),
        "doubled": sum((have - want).values()),
        "other": sum(shown != wanted.get(step) for start in ours for step, shown in start.shown),
    }
