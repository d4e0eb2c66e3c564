"""A callback that keeps a run in the midst of its training until something happens to it."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lit_personalize import stop_signals


class HoldAt(pl.Callback):
    """Wait before a drawn step for a notice, or for the file `go`; only in the first start of the run.

    Args:
        folder: Gets the files `held`, and `noticed` with the time of the notice.
        seed: Draws the step.
        before: It is from 1 to this, without it.
    """

    def __init__(self, folder: str, seed: int, before: int):
        self.folder = Path(folder)
        self.step = random.Random(seed).randrange(1, before)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step != self.step or (self.folder / "held").exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "held").touch()
        while not (self.folder / "go").exists():
            if stop_signals.noted.notice is not None:
                (self.folder / "noticed").write_text(str(time.time()))
                return
            time.sleep(0.005)
