"""A callback that presses Ctrl-C."""

from __future__ import annotations

import os
import signal
from typing import Any

import lightning.pytorch as pl


class InterruptAt(pl.Callback):
    """Send this process SIGINT as the batch of a step begins; the run saves behind that step.

    Args:
        step: Optimizer steps done by then.
    """

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)
