"""A sized loader whose batch k is a function of k, with a cursor that checkpoints carry.

Lightning saves and restores the state of loaders that offer it, and keeps its own count of batches
within an epoch. So `len` is always the whole epoch, a fresh iteration gives a whole epoch, and the first
iteration after a restore gives the rest of the interrupted one. The cursor moves when a batch is
handed out, not when a worker prepares it: at a step boundary nothing is lost or repeated.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Generic, Literal, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from lit_datamodules.worker_signals import WorkerSignals

S = TypeVar("S")
Item = Any
Batch = dict[str, Any]
WorkerStart = Literal["fork", "spawn", "forkserver"]


class _Items(Dataset[Item], Generic[S]):
    def __init__(self, draw: Callable[[S], Item]):
        self.draw = draw

    def __getitem__(self, slot: S) -> Item:
        return self.draw(slot)


class _Steps(Generic[S]):
    """Slots of the steps from `start` to `stop`, for a DataLoader that outlives one epoch."""

    def __init__(self, slots_of_step: Callable[[int], Sequence[S]]):
        self.slots_of_step = slots_of_step
        self.start = self.stop = 0

    def __iter__(self) -> Iterator[list[S]]:
        for step in range(self.start, self.stop):
            yield list(self.slots_of_step(step))

    def __len__(self) -> int:
        return self.stop - self.start


def _as_list(items: list[Item]) -> list[Item]:
    return items


class StepLoader(Generic[S]):
    """Iterate over the steps of an endless training, an epoch at a time.

    Args:
        slots_of_step: The places of step k; a pure function.
        draw: Makes one item of a slot; a pure function that can be sent to a worker process.
        finish: Makes a batch of a step's items, in this process.
        steps_per_epoch: Length.
        num_workers: Processes that draw items ahead.
        worker_start: How they are started.
    """

    def __init__(
        self,
        slots_of_step: Callable[[int], Sequence[S]],
        draw: Callable[[S], Item],
        finish: Callable[[list[Item]], Batch],
        steps_per_epoch: int,
        num_workers: int = 0,
        worker_start: WorkerStart | None = None,
    ):
        self.steps_per_epoch = steps_per_epoch
        self.finish = finish
        self.cursor = 0
        """Next step to hand out, over all epochs."""
        self._in_epoch = 0
        self._restored = False
        self._draw = draw
        self._num_workers = num_workers
        self._worker_start = worker_start if num_workers else None
        self._steps = _Steps(slots_of_step)
        self._loader: DataLoader[Item] | None = None
        self._signals: WorkerSignals | None = None
        self._running: weakref.ref[Generator[Batch, None, None]] | None = None

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        running = self._epoch()
        self._running = weakref.ref(running)
        return running

    def _epoch(self) -> Generator[Batch, None, None]:
        if not (self._restored and self._in_epoch < self.steps_per_epoch):
            self._in_epoch = 0
        self._restored = False
        self._steps.start, self._steps.stop = self.cursor, self.cursor + self.steps_per_epoch - self._in_epoch
        if self._loader is None:
            if self._num_workers:
                self._signals = WorkerSignals(self._worker_start)
                weakref.finalize(self, self._signals.end).atexit = False  # that is its own
            # A generator of its own, because a loader without one draws from the global generator.
            self._loader = DataLoader(
                _Items(self._draw), batch_sampler=self._steps, num_workers=self._num_workers, collate_fn=_as_list,  # type: ignore[arg-type]
                persistent_workers=self._num_workers > 0, generator=torch.Generator(),
                multiprocessing_context=self._worker_start, worker_init_fn=self._signals,
            )  # fmt: skip
        with self._signals.held() if self._signals is not None else nullcontext():
            drawn = iter(self._loader)
        for items in drawn:
            batch = self.finish(items)
            self.cursor += 1
            self._in_epoch += 1
            yield batch

    def close(self) -> None:
        """End the worker processes; a later iteration starts them again.

        Left to the garbage collector, which finalizes queues before workers, each would be waited for seconds.
        """
        running = self._running() if self._running is not None else None
        if running is not None:
            running.close()
        del running
        if self._signals is not None:
            self._signals.end()
        self._loader = self._signals = None

    def state_dict(self) -> dict[str, int]:
        return {"cursor": self.cursor, "in_epoch": self._in_epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where the state was taken."""
        self.cursor, self._in_epoch, self._restored = state["cursor"], state["in_epoch"], True


class FixedLoader:
    """The same few batches at every iteration, for validation."""

    def __init__(self, batches: Callable[[], Iterator[Batch]], length: int):
        self.batches = batches
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()
