"""A live bar on stderr: step, loss, images per second and time left; plain lines where no one is watching."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from lit_callbacks.throughput import Throughput
from lit_personalize.errors import UsageError

REFRESH = 0.25
"""Seconds between two reads of the loss; each waits for the device."""


class Progress(ProgressBar):
    """One bar over all optimizer steps of the run; a resumed run begins where it left off.

    Args:
        plain_every: Steps between two lines when stderr is not a terminal; 0 is silent there.
        smoothing: d of the shown loss, a moving average over the reads.
    """

    def __init__(self, plain_every: int = 50, smoothing: float = 0.9):
        super().__init__()
        if plain_every < 0 or not 0 <= smoothing < 1:
            raise UsageError("plain_every must not be negative, and smoothing must be in [0, 1)")
        self.plain_every = plain_every
        self.smoothing = smoothing
        self.loss: float | None = None
        self._enabled = True
        self._bar: RichProgress | None = None
        self._task: Any = None
        self._begun = (0.0, 0)
        self._read_at = 0.0
        self._boundary = 0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar, or note the time that plain lines count from."""
        self._boundary = trainer.global_step
        self._begun = (time.monotonic(), trainer.global_step)
        console = Console(stderr=True)
        if not self._enabled or not trainer.is_global_zero or not console.is_terminal:
            return
        self._bar = RichProgress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True), TextColumn("left"), console=console, redirect_stdout=False,
        )  # fmt: skip
        total = self._total(trainer)
        self._task = self._bar.add_task("training", total=total, completed=trainer.global_step, figures="")
        self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar, or print a line every `plain_every` steps."""
        step = trainer.global_step
        if not self._enabled or not trainer.is_global_zero or step == self._boundary:
            return
        self._boundary = step
        if self._bar is not None:
            if time.monotonic() - self._read_at >= REFRESH or step == self._total(trainer):
                self._bar.update(self._task, completed=step, figures=self._figures(trainer, outputs))
        elif self.plain_every and (step % self.plain_every == 0 or step == self._total(trainer)):
            total = self._total(trainer)
            counted = f"step {step}/{total}" if total else f"step {step}"
            print(f"{counted}  {self._figures(trainer, outputs)}{self._left(step, total)}", file=sys.stderr, flush=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the finished bar standing."""
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the terminal back before the message is printed."""
        self._stop()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar, on stderr."""
        if self._bar is not None:
            self._bar.console.print(*args)
        else:
            print(*args, file=sys.stderr)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _figures(self, trainer: pl.Trainer, outputs: Any) -> str:
        """Loss and images per second."""
        self._read_at = time.monotonic()
        parts = []
        if isinstance(outputs, Mapping) and outputs.get("loss") is not None:
            value = float(outputs["loss"]) * trainer.accumulate_grad_batches  # Lightning divides it
            self.loss = value if self.loss is None else self.smoothing * self.loss + (1 - self.smoothing) * value
            parts.append(f"loss {self.loss:.4f}")
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        meter = next((c for c in callbacks if isinstance(c, Throughput)), None)
        if meter is not None and meter.images_per_second is not None:
            parts.append(f"{meter.images_per_second:.1f} images/s")
        return "  ".join(parts)

    def _left(self, step: int, total: int | None) -> str:
        since, first = self._begun
        if not total or step == first:
            return ""
        minutes, seconds = divmod(round((time.monotonic() - since) / (step - first) * (total - step)), 60)
        return f"  {minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"

    @staticmethod
    def _total(trainer: pl.Trainer) -> int | None:
        """Optimizer steps of the whole run, or None if it has no end."""
        steps = trainer.estimated_stepping_batches
        return None if steps in (-1, float("inf")) else int(steps)
