"""A sized loader whose batch k is a function of k, with a cursor that checkpoints carry.

Lightning saves and restores the state of loaders that offer it. The cursor names the next step to
train; it moves when a batch is handed out, so at a step boundary nothing is lost or repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from lit_datamodules.errors import DataOptionError

Mapping = dict[str, Any]


class _Steps(Dataset[Mapping]):
    def __init__(self, batch_of_step: Callable[[int], Mapping], steps: int):
        self.batch_of_step = batch_of_step
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Mapping:
        return self.batch_of_step(step)


class StepLoader:
    """Iterate over steps `cursor` to `steps - 1`.

    Args:
        batch_of_step: Makes the whole batch of one step; must be a pure function.
        steps: Length of the one long epoch.
        identity: Of the data set; a checkpoint of another one is refused.
        workers: Processes that make batches ahead.
    """

    def __init__(self, batch_of_step: Callable[[int], Mapping], steps: int, identity: str, workers: int = 0):
        self.steps = _Steps(batch_of_step, steps)
        self.identity = identity
        self.workers = workers
        self.cursor = 0

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Mapping]:
        start = self.cursor if self.cursor < len(self) else 0
        loader = DataLoader(
            self.steps, batch_size=None, sampler=range(start, len(self)), num_workers=self.workers
        )  # fmt: skip
        for step, batch in enumerate(loader, start):
            self.cursor = step + 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": self.cursor, "identity": self.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was taken.

        Raises:
            DataOptionError: The pictures, captions or options changed since.
        """
        if state["identity"] != self.identity:
            raise DataOptionError(
                "the training data changed since the checkpoint was written; "
                "restore the pictures and captions, or start a new run name"
            )
        self.cursor = state["cursor"]
