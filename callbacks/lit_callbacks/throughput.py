"""Images per second, logged as `images_per_second`."""

from __future__ import annotations

import statistics
import time
from collections import deque
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lit_personalize.batch import Batch
from lit_personalize.errors import UsageError


class Throughput(Callback):
    """Measure from batch end to batch end, waiting for data included.

    The median over the last batches leaves out those in which samples were drawn or a checkpoint was written.

    Args:
        window: Batches in the median.
    """

    def __init__(self, window: int = 50):
        if window < 1:
            raise UsageError(f"throughput window must be at least 1, not {window}")
        self.rates: deque[float] = deque(maxlen=window)
        self._last: float | None = None

    @property
    def images_per_second(self) -> float | None:
        """Over all ranks; None before the second batch."""
        return statistics.median(self.rates) if self.rates else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew: the time between two runs is not training."""
        self.rates.clear()
        self._last = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the batch; log the median whenever the loggers are due."""
        now = time.perf_counter()
        size = len(Batch.of(batch))
        if self._last is not None and now > self._last:
            self.rates.append(trainer.world_size * size / (now - self._last))
        self._last = now
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = every and trainer.global_step % every == 0
        if due and (rate := self.images_per_second) is not None:
            pl_module.log("images_per_second", rate, batch_size=size)
