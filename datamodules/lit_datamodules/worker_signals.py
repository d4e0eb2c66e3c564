"""A cluster's notice, or Ctrl-C, reaches every process of a training; those that draw its views must outlive it.

The training saves at the end of the step, and needs its workers until then. One that dies of the signal ends the
training without a save; one that was forked would answer with the training's own handler. TERM is also how a parent
ends its workers: they heed it once the loader that started them is being closed, or its process ends.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

IGNORED = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class WorkerSignals:
    """What a DataLoader takes as `worker_init_fn`; one for each loader.

    Args:
        start: How the workers are started: "fork", "spawn" or "forkserver"; None takes Python's default.
    """

    def __init__(self, start: str | None = None):
        context = multiprocessing.get_context(start)
        self._forks = context.get_start_method() == "fork"
        self._ending = context.RawValue("b", 0)
        # Runs before multiprocessing's own, which has been registered earlier, and which waits for workers.
        atexit.register(self.end)

    def __call__(self, worker: int) -> None:
        """Set the signals of a worker, in its process."""
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._terminate)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*IGNORED, signal.SIGTERM))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Start workers in here: they inherit that signals wait, until they have set their own."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (*IGNORED, signal.SIGTERM))
        try:
            if not self._forks:  # a helper of its own, which is started with some of them unblocked
                resource_tracker.ensure_running()
                signal.pthread_sigmask(signal.SIG_BLOCK, (*IGNORED, signal.SIGTERM))
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def end(self) -> None:
        """From now on TERM ends the workers."""
        self._ending.value = 1
        atexit.unregister(self.end)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        if self._ending.value:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
