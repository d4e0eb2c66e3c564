"""The loader's cursor: the same batches with and without workers, and none lost or doubled by a resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lit_datamodules.step_loader import FixedLoader, StepLoader


def slots(step: int) -> list[int]:
    return [10 * step, 10 * step + 1]


def double(slot: int) -> torch.Tensor:
    return torch.tensor([2 * slot])


def finish(items: list[torch.Tensor]) -> dict[str, Any]:
    return {"values": [int(item) for item in items]}


def loader(length: int = 5, workers: int = 0) -> StepLoader[int]:
    return StepLoader(slots, double, finish, length, workers)


def steps(iterable: Any) -> list[int]:
    batches = [batch["values"] for batch in iterable]
    assert all(values == [20 * (values[0] // 20), values[0] + 2] for values in batches)
    return [values[0] // 20 for values in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_go_on(workers: int) -> None:
    fresh = loader(3, workers)
    assert [steps(fresh), steps(fresh)] == [[0, 1, 2], [3, 4, 5]] and len(fresh) == 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 4, 5, 7])
def test_resume_gives_the_rest_of_the_epoch(workers: int, taken: int) -> None:
    """Workers run ahead of the cursor; what they prepared is not counted as handed out."""
    first = loader(5, workers)
    iterator = iter(first)
    for n in range(taken):
        if n and n % 5 == 0:
            iterator = iter(first)
        next(iterator)
    second = loader(5, workers)
    second.load_state_dict(first.state_dict())
    assert len(second) == 5
    rest = steps(second)
    assert rest == list(range(taken, taken + 5 - taken % 5)), "the rest of the epoch, or a whole one at its end"
    assert steps(second) == list(range(taken + len(rest), taken + len(rest) + 5))


def test_resume_into_a_longer_epoch() -> None:
    """A run of 4 steps that ended is resumed for 6."""
    first = loader(4)
    assert steps(first) == [0, 1, 2, 3]
    second = loader(6)
    second.load_state_dict(first.state_dict())
    assert steps(second) == [4, 5]


def test_abandoned_epoch_is_followed_by_a_whole_one() -> None:
    """As with a limit of batches per epoch."""
    fresh = loader(5, 2)
    iterator = iter(fresh)
    assert steps([next(iterator), next(iterator)]) == [0, 1]
    assert steps(fresh) == [2, 3, 4, 5, 6]


def test_loader_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    steps(loader(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_fixed_loader_repeats() -> None:
    fixed = FixedLoader(lambda: iter([{"values": [0, 2]}]), 1)
    assert len(fixed) == 1 and steps(fixed) == steps(fixed) == [0]
