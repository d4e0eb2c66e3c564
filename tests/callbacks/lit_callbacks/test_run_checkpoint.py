"""What is kept, what is refused, what is never written."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny_training import Loader, train

from lit_callbacks.run_checkpoint import RunCheckpoint
from lit_personalize import checkpoints
from lit_personalize.errors import UsageError


class LogScore(pl.Callback):
    """Log a score that is best at step 2."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        pl_module.log("score", float(-abs(trainer.global_step - 2)), batch_size=1)


def test_keeps_the_newest_and_the_best(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    saving = RunCheckpoint(folder, every=1, keep_last=2, best_metric="score")
    train(base, tmp_path, 5, [saving, LogScore()])
    assert [step for step, _ in checkpoints.published(folder)] == [2, 4, 5]
    assert (folder / "best").read_text() == "step-00000002 score=0\n"
    again = RunCheckpoint(folder, every=1, keep_last=1, best_metric="score")
    train(base, tmp_path, 6, [again, LogScore()], resume=True)
    assert [step for step, _ in checkpoints.published(folder)] == [2, 6], "the best is remembered over a resume"


def test_holds_what_trains_and_nothing_of_the_base(base: Path, tmp_path: Path) -> None:
    train(base, tmp_path, 1)
    found = checkpoints.find_complete(tmp_path / "checkpoints")
    assert found is not None
    names = checkpoints.load_state(found.path)
    assert names and all(name.startswith("adapters.") for name in names)
    averaged = checkpoints.load_state(found.path, averaged=True)
    assert averaged.keys() == names.keys()
    assert any(not torch.equal(averaged[name], names[name]) for name in names)
    assert checkpoints.size_of(found.path) < 200_000, "the base alone is larger"


class Poison(pl.Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            next(p for p in pl_module.parameters() if p.requires_grad).data.view(-1)[0] = float("inf")


def test_poisoned_weights_are_never_published(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        train(base, tmp_path, 3, [RunCheckpoint(tmp_path / "checkpoints", every=1), Poison(2)])
    assert [step for step, _ in checkpoints.published(tmp_path / "checkpoints")] == [1]
    assert "step 2: adapters or optimizer state are not finite" in caplog.text


def test_training_beside_newer_checkpoints_is_refused(base: Path, tmp_path: Path) -> None:
    train(base, tmp_path, 2)
    with pytest.raises(UsageError, match="step 2, but this training starts at step 0.*step-00000002"):
        train(base, tmp_path, 4)
    assert [step for step, _ in checkpoints.published(tmp_path / "checkpoints")] == [2]


def test_a_newer_damaged_one_takes_no_place(base: Path, tmp_path: Path) -> None:
    """With the steps kept by number alone, the save of step 3 would be pruned for the damaged one of step 4."""
    folder = tmp_path / "checkpoints"
    train(base, tmp_path, 4, every=2)
    state = checkpoints.directory(folder, 4) / checkpoints.STATE
    state.write_bytes(state.read_bytes()[:-1])
    train(base, tmp_path, 3, [RunCheckpoint(folder, every=1, keep_last=1)], resume=True)
    found = checkpoints.find_complete(folder)
    assert found is not None and found.step == 3


def test_too_little_space_is_seen_before_writing(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on after a periodic save; at the end it is an error, with the first checkpoint intact."""

    class Fill(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())

    with pytest.raises(checkpoints.PublishError, match=r"step 3 needs 0\.\d MiB.*intact"):
        train(base, tmp_path, 3, [RunCheckpoint(tmp_path / "checkpoints", every=1), Fill()])
    assert "checkpoint of step 2 needs" in caplog.text and "training goes on" in caplog.text
    assert [step for step, _ in checkpoints.published(tmp_path / "checkpoints")] == [1]


def test_runs_after_all_other_callbacks(base: Path, tmp_path: Path) -> None:
    saving = RunCheckpoint(tmp_path / "checkpoints")
    trainer, _ = train(base, tmp_path, 1, [saving, LogScore(), Poison(99)])
    assert trainer.callbacks[-1] is saving and len(set(map(id, trainer.callbacks))) == len(trainer.callbacks)


def test_loader_of_these_tests_goes_on_where_it_was(base: Path) -> None:
    loader = Loader(lambda captions: (torch.zeros(len(captions), 77, dtype=torch.long),))
    first = [batch["sample_id"][0] for batch, _ in zip(loader, range(3), strict=False)]
    assert first == ["0-0.jpg", "1-0.jpg", "2-0.jpg"]
    assert loader.state_dict()["next"] in (3, 4)
