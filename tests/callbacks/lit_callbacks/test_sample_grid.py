"""The grid appears, survives a resume, and never costs a training."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import assert_same, state, train

from lit_callbacks import picture_grid, sample_grid
from lit_callbacks.adapter_ema import AdapterEma
from lit_callbacks.run_checkpoint import RunCheckpoint
from lit_callbacks.sample_grid import SampleGrid
from lit_personalize import checkpoints

PROMPTS = ["a photo of <new1>", "a toy of <new1> on the beach"]


def grid_of(run: Path, **options: Any) -> SampleGrid:
    return SampleGrid(run / "samples", PROMPTS, seeds=[0, 1], every=2, steps=2, **options)


def callbacks(run: Path, grid: SampleGrid | None = None) -> list[Any]:
    return [RunCheckpoint(run / "checkpoints", every=2), AdapterEma(0.9), *([grid] if grid else [])]


def test_columns_of_step_zero_and_of_a_resumed_run(base: Path, tmp_path: Path) -> None:
    train(base, tmp_path, 2, callbacks(tmp_path, grid_of(tmp_path)))
    narrow = Image.open(tmp_path / "samples/grid.png").size
    train(base, tmp_path, 4, callbacks(tmp_path, grid_of(tmp_path)), resume=True)
    folders = sorted(path.name for path in (tmp_path / "samples").glob("step-*"))
    assert folders == ["step-00000000", "step-00000002", "step-00000004"]
    record = json.loads((tmp_path / "samples/step-00000004/samples.json").read_text())
    assert record["prompts"] == PROMPTS and record["pictures"] == ["0_0.png", "0_1.png", "1_0.png", "1_1.png"]
    pictures = [np.asarray(Image.open(tmp_path / "samples" / folder / "0_0.png")) for folder in folders]
    assert pictures[0].shape == (32, 32, 3)
    assert not np.array_equal(pictures[0], pictures[2]), "training must be visible"
    wide = Image.open(tmp_path / "samples/grid.png").size
    assert (
        wide[1] == narrow[1]
        and wide[0] - narrow[0] == narrow[0] - picture_grid.LABEL - (narrow[0] - picture_grid.LABEL) // 2
    )


def test_sampling_changes_nothing_of_the_training(base: Path, tmp_path: Path) -> None:
    train(base, tmp_path / "with", 4, callbacks(tmp_path / "with", grid_of(tmp_path / "with")))
    train(base, tmp_path / "without", 4, callbacks(tmp_path / "without"))
    seen, unseen = state(tmp_path / "with", 4), state(tmp_path / "without", 4)
    assert_same({**seen, "callbacks": {}}, {**unseen, "callbacks": {}})


def test_draws_with_the_average(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives the trained weights back after it."""
    used: list[dict[str, torch.Tensor]] = []

    def spy(base: Any, prompts: Any, seeds: Any, adapters: Any, *_: Any) -> np.ndarray:
        used.append(adapters[0].snapshot())
        return np.full((len(prompts), 32, 32, 3), 99, np.uint8)

    monkeypatch.setattr(sample_grid, "generate", spy)
    ema = AdapterEma(0.9)
    _, module = train(base, tmp_path, 2, [ema, grid_of(tmp_path)])
    own = module.adapters[0].snapshot()
    averaged = {f"adapters.0.factors.{name.replace('.', '|')}": value for name, value in used[-1].items()}
    assert all(torch.equal(ema.shadow[name], value) for name, value in averaged.items())
    assert any(not torch.equal(own[name], used[-1][name]) for name in own)


@pytest.mark.parametrize(
    ("error", "reason"),
    [(torch.cuda.OutOfMemoryError("CUDA out of memory"), "out of memory"), (RuntimeError("broken VAE"), "broken VAE")],
)
def test_failure_is_logged_and_training_goes_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    error: Exception, reason: str,
) -> None:  # fmt: skip
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(sample_grid, "generate", fail)
    grid = grid_of(tmp_path)
    trainer, _ = train(base, tmp_path, 3, callbacks(tmp_path, grid))
    assert trainer.global_step == 3 and grid.failures == 3
    assert "step 2: no samples drawn" in caplog.text and reason in caplog.text
    found = checkpoints.find_complete(tmp_path / "checkpoints")
    assert found is not None and found.step == 3


def test_out_of_memory_is_tried_again_picture_by_picture(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sample_grid.generate

    def narrow(base: Any, prompts: Any, seeds: Any, adapters: Any, options: Any, resolution: Any) -> np.ndarray:
        if options.batch_size > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(base, prompts, seeds, adapters, options, resolution)

    monkeypatch.setattr(sample_grid, "generate", narrow)
    grid = grid_of(tmp_path)
    train(base, tmp_path, 1, [grid])
    assert grid.failures == 0 and (tmp_path / "samples/step-00000000/1_1.png").exists()


def test_black_pictures_are_reported(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """NaN weights give black pictures, without any exception."""
    import lightning.pytorch as pl

    class Poison(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            for parameter in pl_module.adapters.parameters():
                parameter.data.fill_(float("nan"))

    with caplog.at_level(logging.WARNING):
        train(base, tmp_path, 1, [Poison(), grid_of(tmp_path, at_start=False)])
    assert f"step 1: 4 of 4 samples are black (first: '{PROMPTS[0]}')" in caplog.text


def test_goes_to_tensorboard(base: Path, tmp_path: Path) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, module = train(base, tmp_path, 1, [])
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer.loggers = [logger]
    grid_of(tmp_path).draw(trainer, module)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["images"] == ["samples"]


def test_long_runs_show_first_and_last_column() -> None:
    assert picture_grid.thin(list(range(5)), 24) == [0, 1, 2, 3, 4]
    shown = picture_grid.thin(list(range(100)), 10)
    assert len(shown) == 10 and shown[0] == 0 and shown[-1] == 99
