"""When one rank of a training fails, all end, and what they report is its error."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.distributed import DistBackendError

from lit_personalize.errors import RankLostError

PATIENCE = 30.0
"""Seconds in which a process that broke a connection has ended and given its exit code."""


class OtherRanks(Callback):
    """Tell a rank's own error from the one that it meets because another rank is gone.

    Of the processes that Lightning started for further devices, none is left behind. Its own observer would end the
    whole training by SIGKILL, and with it the message and the exit code.
    """

    def __init__(self) -> None:
        self.lost: RankLostError | None = None
        """What to raise instead of a broken connection."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Find out whose error it is, and end the processes that this one started."""
        if trainer.world_size == 1:
            return
        started: list[Any] = getattr(trainer.strategy.launcher, "procs", [])
        processes = list(started)
        started.clear()  # the observer looks at this list
        if isinstance(exception, DistBackendError) or "by peer" in str(exception):  # NCCL's words, and gloo's
            self.lost = RankLostError(_code_of_the_first(processes) or 1)
        for process in processes:
            process.kill()


def _code_of_the_first(processes: list[Any]) -> int:
    """Exit code of the process that fails first; 0 where none does in time, or it was killed."""
    until = time.monotonic() + PATIENCE
    while processes and time.monotonic() < until:
        if codes := [code for code in (process.poll() for process in processes) if code]:
            return max(0, int(codes[0]))
        time.sleep(0.05)
    return 0
