"""N + M steps are N steps, an end of any kind, and M steps: to the bit."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import tiny_training
from tiny_training import assert_same, state, train

from lit_callbacks.adapter_ema import AdapterEma
from lit_callbacks.non_finite_guard import NonFiniteGuard
from lit_callbacks.run_checkpoint import RunCheckpoint
from lit_callbacks.throughput import Throughput
from lit_personalize import checkpoints
from lit_personalize.stop_signals import NOTICES, noted

STEPS = 8


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """States of one training that nothing happened to, by step."""
    run = tmp_path_factory.mktemp("undisturbed")
    train(base, run, STEPS, every=1)
    return {step: state(run, step) for step in range(1, STEPS + 1)}


@pytest.fixture(scope="module")
def in_process() -> Iterator[Callable[..., int]]:
    """Run a function in a fresh process; imports are paid for once. Returns its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_training"])
    patch = pytest.MonkeyPatch()
    # The server imports before it is told this process's path.
    patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))

    def run(target: Callable[..., None], *arguments: Any) -> int:
        process = context.Process(target=target, args=arguments)
        process.start()
        process.join(120)
        if process.exitcode is None:
            process.kill()
            pytest.fail(f"{target.__name__} hung")
        return process.exitcode

    yield run
    patch.undo()


@pytest.mark.parametrize("split", [1, 4, 5, 6])
def test_split_run_is_the_undisturbed_run(base: Path, tmp_path: Path, undisturbed: Any, split: int) -> None:
    """Before, at and after the end of an epoch, which is at step 5."""
    train(base, tmp_path, split, every=100)
    assert_same(state(tmp_path, split), undisturbed[split])
    trainer, module = train(base, tmp_path, STEPS, every=100, resume=True)
    assert trainer.global_step == STEPS and module.draws == STEPS
    assert_same(state(tmp_path, STEPS), undisturbed[STEPS])


@pytest.mark.parametrize("split", [3, 5, 7])
def test_a_training_that_was_stopped_goes_on(base: Path, tmp_path: Path, undisturbed: Any, split: int) -> None:
    """As a timer or early stopping does, inside and at the end of an epoch: nothing is saved before the very end."""

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.should_stop or trainer.global_step == split

    callbacks = [RunCheckpoint(tmp_path / "checkpoints", every=100), AdapterEma(0.9), NonFiniteGuard(), Throughput()]
    trainer, _ = train(base, tmp_path, STEPS, [*callbacks, Stop()])
    assert trainer.global_step == split
    assert_same(state(tmp_path, split), undisturbed[split])
    train(base, tmp_path, STEPS, every=100, resume=True)
    assert_same(state(tmp_path, STEPS), undisturbed[STEPS])


def test_finished_run_stays_as_it_is(base: Path, tmp_path: Path, undisturbed: Any) -> None:
    train(base, tmp_path, STEPS, every=100)
    written = (checkpoints.directory(tmp_path / "checkpoints", STEPS) / checkpoints.MARK).read_bytes()
    trainer, module = train(base, tmp_path, STEPS, every=100, resume=True)
    assert trainer.global_step == module.draws == STEPS
    assert (checkpoints.directory(tmp_path / "checkpoints", STEPS) / checkpoints.MARK).read_bytes() == written


def test_training_changes_what_is_compared(undisturbed: Any) -> None:
    with pytest.raises(AssertionError, match="state_dict"):
        assert_same(undisturbed[STEPS], undisturbed[STEPS - 1])


def test_split_inside_an_accumulation_epoch(base: Path, tmp_path: Path) -> None:
    """Five batches by twos: the optimizer steps after batches 2, 4 and 5 of every epoch."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(base, whole, 6, every=1, accumulate_grad_batches=2)
    assert [step for step, _ in checkpoints.published(whole / "checkpoints")] == [1, 2, 3, 4, 5, 6]
    train(base, parts, 2, every=100, accumulate_grad_batches=2)
    train(base, parts, 6, every=100, accumulate_grad_batches=2, resume=True)
    assert_same(state(parts, 6), state(whole, 6))


def test_run_of_epochs_goes_on(base: Path, tmp_path: Path) -> None:
    """A run that ended with an epoch is resumed for another one; a finished one stays as it is."""
    train(base, tmp_path / "whole", -1, max_epochs=2, every=100)
    train(base, tmp_path / "parts", -1, max_epochs=1, every=100)
    trainer, _ = train(base, tmp_path / "parts", -1, max_epochs=2, every=100, resume=True)
    assert trainer.global_step == 10
    assert_same(state(tmp_path / "parts", 10), state(tmp_path / "whole", 10))
    trainer, _ = train(base, tmp_path / "parts", -1, max_epochs=2, every=100, resume=True)
    assert trainer.global_step == 10


@pytest.mark.parametrize(
    ("where", "step", "left"), [("between", 5, 4), ("in the file", 4, 2), ("before the rename", 6, 4)]
)
def test_killed_run_goes_on_as_if_nothing_had_happened(
    base: Path, tmp_path: Path, undisturbed: Any, in_process: Any, where: str, step: int, left: int
) -> None:
    assert in_process(tiny_training.train_until_killed, base, tmp_path, step, where) == -signal.SIGKILL
    found = checkpoints.find_complete(tmp_path / "checkpoints")
    assert found is not None and found.step == left and found.skipped == []
    assert_same(state(tmp_path, left), undisturbed[left])
    assert in_process(tiny_training.train_in_process, base, tmp_path, STEPS, True) == 0
    assert_same(state(tmp_path, STEPS), undisturbed[STEPS])
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_resume_passes_over_a_damaged_checkpoint_and_mends_it(base: Path, tmp_path: Path, undisturbed: Any) -> None:
    train(base, tmp_path, 4)
    newest = checkpoints.directory(tmp_path / "checkpoints", 4) / checkpoints.STATE
    newest.write_bytes(newest.read_bytes()[:-100])
    train(base, tmp_path, STEPS, resume=True)
    assert_same(state(tmp_path, 4), undisturbed[4])
    assert_same(state(tmp_path, STEPS), undisturbed[STEPS])


def test_full_disk_costs_no_earlier_checkpoint(base: Path, tmp_path: Path, undisturbed: Any, in_process: Any) -> None:
    assert in_process(tiny_training.train_on_a_full_disk, base, tmp_path, 4096) == 1, "the last save is an error"
    assert (tmp_path / "still-training").exists(), "the save at step 4 must not have ended training"
    assert [step for step, _ in checkpoints.published(tmp_path / "checkpoints")] == [2]
    assert_same_but_guard(state(tmp_path, 2), undisturbed[2])
    assert not list((tmp_path / "checkpoints").glob(".*"))


def assert_same_but_guard(a: dict[str, Any], b: dict[str, Any]) -> None:
    """The run on the full disk has fewer callbacks."""
    assert_same({**a, "callbacks": {}}, {**b, "callbacks": {}})


@pytest.mark.parametrize(
    ("sent", "preempted"), [(["SIGINT"], ""), (["SIGUSR2"], "SIGUSR2"), (["SIGTERM", "SIGUSR1"], "SIGTERM")]
)
def test_a_signal_saves_at_a_step_boundary(
    base: Path, tmp_path: Path, undisturbed: Any, sent: list[str], preempted: str
) -> None:
    """Ctrl-C, or a cluster's notice, in the middle of step 3; a second notice changes nothing."""
    import lightning.pytorch as pl

    class Press(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                for name in sent:
                    signal.raise_signal(signal.Signals[name])

    numbers = (signal.SIGINT, *NOTICES)
    before = [signal.getsignal(number) for number in numbers]
    saving = RunCheckpoint(tmp_path / "checkpoints", every=100)
    with pytest.raises(SystemExit):
        train(base, tmp_path, STEPS, [Press(), saving, AdapterEma(0.9), NonFiniteGuard(), Throughput()])
    assert saving.interrupted and saving.preempted == preempted
    assert [signal.getsignal(number) for number in numbers] == before
    assert noted.notice is None and not noted.interrupt, "it was heeded; the next training is another one"
    assert_same(state(tmp_path, 3), undisturbed[3])
    train(base, tmp_path, STEPS, resume=True)
    assert_same(state(tmp_path, STEPS), undisturbed[STEPS])


@pytest.mark.parametrize("number", NOTICES)
def test_a_notice_during_the_save_of_another(
    base: Path, tmp_path: Path, undisturbed: Any, number: signal.Signals
) -> None:
    """And with handlers installed before, as submitit does: they are not called, and get their signals back."""
    theirs: list[int] = []

    def handler(number: int, frame: Any) -> None:
        theirs.append(number)

    class Press(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                signal.raise_signal(signal.SIGUSR2)

        def on_save_checkpoint(self, *_: Any) -> None:
            signal.raise_signal(number)

    before = {number: signal.signal(number, handler) for number in NOTICES}
    try:
        callbacks = [RunCheckpoint(tmp_path / "checkpoints", every=100), AdapterEma(0.9), NonFiniteGuard()]
        with pytest.raises(SystemExit):
            train(base, tmp_path, STEPS, [Press(), *callbacks, Throughput()])
        assert all(signal.getsignal(number) is handler for number in NOTICES) and not theirs
        signal.raise_signal(number)
        assert theirs == [number]
    finally:
        for each, was in before.items():
            signal.signal(each, was)
    assert noted.notice is None
    assert_same(state(tmp_path, 3), undisturbed[3])
    train(base, tmp_path, STEPS, resume=True)
    assert_same(state(tmp_path, STEPS), undisturbed[STEPS])
