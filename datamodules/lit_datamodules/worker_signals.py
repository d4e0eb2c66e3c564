"""A cluster's notice, or Ctrl-C, reaches every process of a training; those that draw its views must outlive it.

The training saves at the end of the step, and needs its workers until then. One that dies of the signal ends the
training without a save; one that was forked would answer with the training's own handler. TERM is also how a parent
ends its workers: they heed it once the loader that started them is being closed, or its process ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker, util
from multiprocessing.connection import wait
from types import FrameType
from typing import Any

IGNORED = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class WorkerSignals:
    """What a DataLoader takes as `worker_init_fn`; one for each loader.

    Args:
        start: How the workers are started: "fork", "spawn" or "forkserver"; None takes Python's default.
    """

    def __init__(self, start: str | None = None):
        context = multiprocessing.get_context(start)
        self._method = context.get_start_method()
        self._ending = context.RawValue("b", 0)
        # As the process ends, before multiprocessing tells workers to end and waits for them; also in its children.
        self._at_exit = util.Finalize(None, self._allow, exitpriority=100)

    def __call__(self, worker: int) -> None:
        """Set the signals of a worker, in its process."""
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._terminate)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*IGNORED, signal.SIGTERM))
        if self._method == "forkserver":  # torch watches the parent, the server, which lives as long as they do
            threading.Thread(target=_end_with_the_trainer, daemon=True).start()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_at_exit": None}  # a worker has no workers

    @contextmanager
    def held(self) -> Iterator[None]:
        """Start workers in here: they inherit that signals wait, until they have set their own."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (*IGNORED, signal.SIGTERM))
        try:
            if self._method != "fork":  # a helper of its own, which is started with some of them unblocked
                resource_tracker.ensure_running()
                signal.pthread_sigmask(signal.SIG_BLOCK, (*IGNORED, signal.SIGTERM))
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def end(self) -> None:
        """From now on TERM ends the workers."""
        self._at_exit.cancel()
        self._allow()

    def _allow(self) -> None:
        self._ending.value = 1

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        if self._ending.value:
            os._exit(0)  # of any other end torch makes an error of the process that is about to end


def _end_with_the_trainer() -> None:
    """Wait until the process that asked for this worker is gone, also by SIGKILL."""
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        wait([trainer.sentinel])
        os._exit(1)
