"""Fidelity against drift: zero drift before training, no cost to it, and a say in which checkpoint is kept."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_training import assert_same, state, train

from lit_callbacks import fidelity_drift
from lit_callbacks.adapter_ema import AdapterEma
from lit_callbacks.fidelity_drift import METRIC, FidelityDrift
from lit_callbacks.run_checkpoint import RunCheckpoint
from lit_personalize import checkpoints
from lit_personalize.errors import UsageError
from lit_personalize.sampling.sampler import SamplingOptions


@pytest.fixture
def references() -> list[np.ndarray]:
    return [np.random.default_rng(i).integers(0, 255, (40, 30, 3), dtype=np.uint8) for i in range(2)]


def measuring(references: list[np.ndarray], clip: Path, kind: Any = FidelityDrift, **options: Any) -> FidelityDrift:
    return kind(
        references, ["a photo of <new1>"], ["a photo of a cat"], clip, [0, 1], options=SamplingOptions(2), **options
    )


def callbacks(run: Path, *more: Any) -> list[Any]:
    return [*more, RunCheckpoint(run / "checkpoints", every=2, keep_last=1, best_metric=METRIC), AdapterEma(0.9)]


def test_a_run_keeps_its_best_step(base: Path, metric_clip: Path, references: list[np.ndarray], tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Watched(FidelityDrift):
        def measure(self, *given: Any) -> dict[str, float]:
            seen.append(super().measure(*given))
            return seen[-1]

    watched = measuring(references, metric_clip, kind=Watched, every=2)
    train(base, tmp_path, 8, callbacks(tmp_path, watched))
    assert len(seen) == 4
    assert all(m[METRIC] == pytest.approx(m["fidelity"] - m["drift"]) for m in seen)
    best = 2 + 2 * int(np.argmax([m[METRIC] for m in seen]))
    assert {step for step, _ in checkpoints.published(tmp_path / "checkpoints")} == {best, 8}
    found = checkpoints.find_best(tmp_path / "checkpoints")
    assert found is not None and found.step == best


def test_nothing_has_drifted_before_training(
    base: Path, metric_clip: Path, references: list[np.ndarray], tmp_path: Path
) -> None:
    still = measuring(references, metric_clip, every=1)
    values: list[dict[str, float]] = []
    trainer, module = train(base, tmp_path, 1, callbacks(tmp_path, still), lr=0.0)
    values.append(still.measure(trainer, module))
    assert values[0]["drift"] == pytest.approx(0, abs=1e-5) and -1 <= values[0]["fidelity"] <= 1


def test_measuring_changes_nothing_of_the_training(
    base: Path, metric_clip: Path, references: list[np.ndarray], tmp_path: Path
) -> None:
    train(base, tmp_path / "with", 2, callbacks(tmp_path / "with", measuring(references, metric_clip, every=1)))
    train(base, tmp_path / "without", 2, callbacks(tmp_path / "without"))
    seen, unseen = (state(tmp_path / name, 2) for name in ("with", "without"))
    assert_same({**seen, "callbacks": {}}, {**unseen, "callbacks": {}})


def test_a_failed_measurement_does_not_end_the_training(
    base: Path, metric_clip: Path, references: list[np.ndarray], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    draw, calls = fidelity_drift.generate, []

    def fail_later(*given: Any, **options: Any) -> np.ndarray:
        calls.append(1)
        if len(calls) > 1:
            raise MemoryError("no memory for sampling")
        return draw(*given, **options)

    monkeypatch.setattr(fidelity_drift, "generate", fail_later)
    with caplog.at_level(logging.WARNING):
        train(base, tmp_path, 2, callbacks(tmp_path, measuring(references, metric_clip, every=2)))
    assert "step 2: fidelity and drift not measured" in caplog.text
    assert [step for step, _ in checkpoints.published(tmp_path / "checkpoints")] == [2]


def test_what_it_needs_is_asked_for(metric_clip: Path, references: list[np.ndarray]) -> None:
    with pytest.raises(UsageError, match="reference pictures"):
        measuring([], metric_clip)
    with pytest.raises(UsageError, match="every must be at least 1"):
        measuring(references, metric_clip, every=0)
