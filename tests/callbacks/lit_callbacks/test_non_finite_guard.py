"""A NaN stops the run before it reaches the weights, or is skipped within a counted budget."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny_training import train

from lit_callbacks import non_finite_guard
from lit_callbacks.non_finite_guard import NonFiniteGuard
from lit_callbacks.run_checkpoint import RunCheckpoint
from lit_personalize import checkpoints
from lit_personalize.errors import NonFiniteError


class Watch(pl.Callback):
    """Copies of the adapters and of Adam's moments after each step."""

    def __init__(self) -> None:
        self.seen: list[list[torch.Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        moments = [v for s in trainer.optimizers[0].state.values() for v in s.values()]
        self.seen.append([t.detach().clone() for t in [*pl_module.adapters.parameters(), *moments]])


def test_stops_before_the_step_and_names_step_and_files(base: Path, tmp_path: Path) -> None:
    watch = Watch()
    saving = RunCheckpoint(tmp_path / "checkpoints", every=1)
    with pytest.raises(NonFiniteError, match=r"step 2: the loss is nan; batch: 2-0\.jpg, 2-1\.jpg"):
        train(base, tmp_path, 5, [NonFiniteGuard(), watch, saving], poisoned=(2,))
    assert len(watch.seen) == 2
    found = checkpoints.find_complete(tmp_path / "checkpoints")
    assert found is not None and found.step == 2


def test_skip_leaves_weights_and_optimizer_untouched(base: Path, tmp_path: Path) -> None:
    watch, guard = Watch(), NonFiniteGuard(skip_budget=1)
    train(base, tmp_path, 5, [guard, watch], poisoned=(2,))
    assert guard.skipped == [2] and len(watch.seen) == 5
    assert all(torch.equal(a, b) for a, b in zip(watch.seen[1], watch.seen[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(watch.seen[2], watch.seen[3], strict=True))
    assert all(bool(torch.isfinite(t).all()) for t in watch.seen[-1])


def test_budget_counts_over_a_resume(base: Path, tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [NonFiniteGuard(skip_budget=1), RunCheckpoint(tmp_path / "checkpoints", every=1)]

    train(base, tmp_path, 3, callbacks(), poisoned=(1, 4))
    with pytest.raises(NonFiniteError, match=r"step 4: .*4-0\.jpg.*1 of 1 allowed steps were skipped"):
        train(base, tmp_path, 6, callbacks(), poisoned=(1, 4), resume=True)


def test_names_only_the_guilty_part_of_an_accumulation(base: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"step 0: the loss is nan; batch: 1-0\.jpg, 1-1\.jpg\. "):
        train(base, tmp_path, 5, [NonFiniteGuard()], poisoned=(1,), accumulate_grad_batches=2)


class Spoil(pl.Callback):
    """Put an infinity into a gradient, or into a weight after the last step."""

    def __init__(self, what: str):
        self.what = what

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.what == "gradient" and trainer.global_step == 1:
            next(p for p in pl_module.parameters() if p.grad is not None).grad.view(-1)[0] = float("inf")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self.what == "weight" and trainer.global_step == 2:
            next(p for p in pl_module.parameters() if p.requires_grad).data.view(-1)[0] = float("nan")


def test_infinite_gradient_under_a_finite_loss(base: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"step 1: a gradient is inf; batch: 1-0\.jpg"):
        train(base, tmp_path, 5, [Spoil("gradient"), NonFiniteGuard()])


def test_weights_broken_by_the_last_step(base: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="the last step left adapters that are not finite"):
        train(base, tmp_path, 2, [Spoil("weight"), NonFiniteGuard()])


def test_broken_weights_are_not_skipped(base: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="the step before must have broken them"):
        train(base, tmp_path, 4, [Spoil("weight"), NonFiniteGuard(skip_budget=100)])


@pytest.mark.parametrize("where", ["small", "large"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -7.0])
def test_one_bad_number_among_many_is_seen(where: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(non_finite_guard, "SMALL", 50)
    tensors = {"small": [torch.ones(2, 3), torch.ones(4, dtype=torch.float64)], "large": [torch.ones(10, 9)]}
    tensors[where][0][1, 2] = value
    found = float(non_finite_guard._largest(tensors["small"] + tensors["large"]))
    assert found == abs(value) or (math.isnan(value) and math.isnan(found))
