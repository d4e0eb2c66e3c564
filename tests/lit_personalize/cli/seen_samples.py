"""A callback for runs in processes of their own: it notes what each rank is shown, and can end one of them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl


class SeenSamples(pl.Callback):
    """Add a JSON line per batch to `folder/rank-R.jsonl`.

    Args:
        folder: Where the lines go.
        kill_at: Step before which rank 1 ends by SIGKILL, once per folder; -1 is never.
    """

    def __init__(self, folder: str, kill_at: int = -1):
        self.folder = Path(folder)
        self.kill_at = kill_at

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        killed = self.folder / "killed"
        if trainer.global_step == self.kill_at and trainer.global_rank == 1 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        line = {
            "step": trainer.global_step, "position": batch.position.tolist(), "ids": list(batch.sample_id),
            "captions": list(batch.captions), "role": batch.role.tolist(), "pixels": float(batch.pixels.double().sum()),
        }  # fmt: skip
        with (self.folder / f"rank-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
