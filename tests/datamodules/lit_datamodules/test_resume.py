"""N + M steps are N steps, a checkpoint, a new process's objects, and M steps: the same samples in the same order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lit_datamodules.concept_folder import Concept
from lit_datamodules.errors import DataError
from lit_datamodules.personalization import PersonalizationData
from lit_datamodules.regularization import Regularization

Write = Callable[..., Path]


class Recorder(pl.LightningModule):
    """One parameter, and notes of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[Any, ...]] = []
        self.validated = 0

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        checksum = float(batch["pixels"].double().sum())
        self.seen.append((*batch["sample_id"], *batch["captions"], checksum))
        return self.weight * 2

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validated += len(batch["role"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEvery(pl.Callback):
    """Save at every step boundary, as the run's own checkpoints are."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.saved = 0

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.saved = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step > self.saved:
            self.saved = trainer.global_step
            trainer.save_checkpoint(self.folder / f"{self.saved}.ckpt")


@pytest.fixture
def train(base: Any, folder: Write, tmp_path: Path) -> Callable[..., Recorder]:
    photos, reg = folder(count=5), folder("reg", 3, 8)

    def run(
        steps: int, resume: int = 0, workers: int = 0, held_out: int = 0, batch_size: int = 2, **options: Any
    ) -> Recorder:
        concept = Concept(str(photos), "cat", "<new1>", prompt="object", held_out=held_out)
        sets = Regularization(folder=str(reg), prompt="a cat")
        data = PersonalizationData([concept], 32, sets, batch_size, "custom_diffusion", flip=True, num_workers=workers)
        data.bind(base, base)
        module = Recorder()
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[SaveEvery(tmp_path)],
            **{"max_steps": steps, "max_epochs": -1, **options},
        )  # fmt: skip
        path = str(tmp_path / f"{resume}.ckpt") if resume else None
        trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
        return module

    return run


@pytest.mark.parametrize(("workers", "workers_after"), [(0, 0), (2, 0), (0, 2)])
def test_parts_are_the_whole(train: Callable[..., Recorder], workers: int, workers_after: int) -> None:
    whole = train(9).seen
    assert len(whole) == 9 and len(set(whole)) == 9
    first = train(4, workers=workers).seen
    rest = train(9, resume=4, workers=workers_after).seen
    assert first + rest == whole


@pytest.mark.parametrize("at", [1, 5, 8])
def test_resume_of_a_run_that_was_cut_off(train: Callable[..., Recorder], at: int) -> None:
    """The checkpoint was written on the way to more steps."""
    whole = train(9).seen
    assert train(9, resume=at).seen == whole[at:]
    assert train(8, resume=at).seen == whole[at:8] if at < 8 else True


def test_accumulated_batches(train: Callable[..., Recorder]) -> None:
    """An epoch is as many batches as the steps need, so that none is cut short."""
    whole = train(4, accumulate_grad_batches=3).seen
    assert len(whole) == 12
    assert train(4, resume=2, accumulate_grad_batches=3).seen == whole[6:]


def test_epochs_over_the_pictures(train: Callable[..., Recorder]) -> None:
    """Without a number of steps an epoch is one pass: 5 pictures by twos are 3 batches."""
    whole = train(-1, max_epochs=3).seen
    assert len(whole) == 9
    # Checkpoints of the resumed runs take the place of the first ones: 4 is then resumed for the second time.
    for at in (2, 3, 4):
        assert train(-1, resume=at, max_epochs=3).seen == whole[at:], at
    # Lightning miscounts the epochs of a run that was resumed twice at their ends; the order of samples holds.
    for at in (6, 7):
        assert train(-1, resume=at, max_epochs=3).seen[: 9 - at] == whole[at:], at


def test_validation_on_held_out_pictures(train: Callable[..., Recorder]) -> None:
    module = train(4, held_out=2, val_check_interval=2, num_sanity_val_steps=0)
    assert module.validated == 4 and len(module.seen) == 4


def test_changed_pictures_are_refused(train: Callable[..., Recorder], tmp_path: Path) -> None:
    train(3)
    photo = tmp_path / "photos/00001.png"
    photo.write_bytes((tmp_path / "photos/00002.png").read_bytes())
    with pytest.raises(DataError, match=r"changed since the checkpoint was written \(concept 0/00001\.png\)") as caught:
        train(6, resume=3)
    assert caught.value.exit_code == 3


def test_changed_options_are_warned_of(train: Callable[..., Recorder], caplog: pytest.LogCaptureFixture) -> None:
    train(3)
    train(4, resume=3)
    assert "data.batch_size" not in caplog.text
    train(4, resume=3, batch_size=1)
    assert "data.batch_size was 2 when the checkpoint was written and is 1 now" in caplog.text


def test_changed_weights_of_the_streams_are_warned_of(
    base: Any, folder: Write, caplog: pytest.LogCaptureFixture
) -> None:
    """What decides how often a picture comes, and how, is an option like the others."""
    photos, reg = str(folder(count=3)), str(folder("reg", 3, 8))

    def data(repeats: int, flip: float | None, per_batch: int | None) -> PersonalizationData:
        concept = Concept(photos, "cat", prompt="a cat", repeats=repeats, flip=flip)
        made = PersonalizationData([concept], 32, Regularization(folder=reg, prompt="a cat", per_batch=per_batch))
        made.bind(base, base)
        made.setup("fit")
        return made

    saved = data(1, None, None).state_dict()
    caplog.set_level("WARNING", "lit_datamodules")  # reports of what was read are of no interest here
    caplog.clear()
    data(1, None, None).load_state_dict(saved)
    assert not caplog.text
    data(2, 0.5, 3).load_state_dict(saved)
    for what in ("concepts.repeats was [1]", "concepts.flip was [None]", "regularization.per_batch was [None]"):
        assert f"data.{what} when the checkpoint was written" in caplog.text
