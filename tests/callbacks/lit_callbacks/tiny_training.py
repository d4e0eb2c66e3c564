"""A training of tenths of a second a step: LoRA and a new token on a tiny random base, with a stateful loader."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment

from lit_callbacks.adapter_ema import AdapterEma
from lit_callbacks.non_finite_guard import NonFiniteGuard
from lit_callbacks.run_checkpoint import RunCheckpoint
from lit_callbacks.sample_grid import SampleGrid
from lit_callbacks.throughput import Throughput
from lit_personalize import checkpoints
from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.token_embedding import TokenEmbedding
from lit_personalize.objectives.denoising import Denoising

EPOCH = 5
"""Batches in an epoch of `Loader`."""


class Loader:
    """Batches that are a function of their global index; sized and resumable. `poisoned` ones hold NaN."""

    channels = 4
    """Of the latents; the tiny bases have 4, the embedded one 8."""

    def __init__(self, tokenize: Any, size: int = 2, poisoned: tuple[int, ...] = ()):
        self.tokenize, self.size, self.poisoned = tokenize, size, poisoned
        self.next = 0

    def __len__(self) -> int:
        return EPOCH

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(EPOCH - self.next % EPOCH):
            self.next += 1
            yield self.batch(self.next - 1)

    def batch(self, index: int) -> dict[str, Any]:
        draws = torch.Generator().manual_seed(index)
        mean = torch.randn(self.size, self.channels, 16, 16, generator=draws)
        if index in self.poisoned:
            mean[0] = float("nan")
        words = ["photo", "picture", "toy"]
        return {
            "role": torch.zeros(self.size, dtype=torch.long),
            "position": torch.arange(self.size),
            "sample_id": [f"{index}-{i}.jpg" for i in range(self.size)],
            "latent_mean": mean,
            "latent_std": torch.full_like(mean, 0.1),
            "input_ids": self.tokenize([f"a {words[(index + i) % 3]} of <new1>" for i in range(self.size)]),
        }

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def objective(base: Path, lr: float = 1e-2) -> Denoising:
    return Denoising(
        str(base),
        [LoRA(rank=2, targets="key_value"), TokenEmbedding("<new1>", "cat", lr=5e-3)],
        optimizer=functools.partial(torch.optim.AdamW, lr=lr),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
        seed=3,
    )


def train(
    base: Path,
    run: Path,
    steps: int,
    callbacks: list[Any] | None = None,
    every: int = 2,
    keep_last: int = 20,
    resume: bool = False,
    poisoned: tuple[int, ...] = (),
    lr: float = 1e-2,
    **trainer_options: Any,
) -> tuple[pl.Trainer, Denoising]:
    """Train to `steps`, from the newest whole checkpoint if `resume`."""
    torch.set_num_threads(1)
    module = objective(base, lr)
    module.configure_model()
    loader = Loader(module.built.tokenize, poisoned=poisoned)
    if callbacks is None:
        saving = RunCheckpoint(run / "checkpoints", every=every, keep_last=keep_last)
        callbacks = [saving, AdapterEma(0.9), NonFiniteGuard(), Throughput()]
    watched = any(isinstance(c, pl.callbacks.ProgressBar) for c in callbacks)
    options = {"max_steps": steps, "max_epochs": -1, **trainer_options}
    trainer = pl.Trainer(
        logger=False, enable_checkpointing=False, callbacks=callbacks, accelerator="cpu", devices=1,
        enable_model_summary=False, enable_progress_bar=watched, plugins=[LightningEnvironment()], **options,
    )  # fmt: skip
    found = checkpoints.find_complete(run / "checkpoints") if resume else None
    trainer.fit(module, loader, ckpt_path=str(found.state) if found else None, weights_only=True)
    return trainer, module


def state(run: Path, step: int) -> dict[str, Any]:
    """A stored state, loaded as plain types."""
    path = checkpoints.directory(run / "checkpoints", step)
    assert not checkpoints.problems(path)
    return torch.load(path / checkpoints.STATE, weights_only=True)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Leaves of nested containers by their path."""
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list | tuple):
        pairs = list(enumerate(value))
    else:
        return {name: value}
    return {k: v for key, part in pairs for k, v in flat(part, f"{name}/{key}").items()}


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Everything that training goes on from is equal to the bit."""
    for key in (
        "state_dict",
        checkpoints.AVERAGED,
        "optimizer_states",
        "lr_schedulers",
        "litp",
        "global_step",
        "callbacks",
    ):
        left, right = flat(a[key]), flat(b[key])
        assert left.keys() == right.keys(), key
        for name in left:
            equal = torch.equal(left[name], right[name]) if torch.is_tensor(left[name]) else left[name] == right[name]
            assert equal, f"{key}{name}: {left[name]} is not {right[name]}"
    assert (
        a["loops"]["fit_loop"]["state_dict"]["combined_loader"]
        == b["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    )


# ---- bodies of processes that tests start ------------------------------------------------------------


class KillAt(pl.Callback):
    """End the process as `kill -9` does, after `step` steps."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(base: Path, run: Path, step: int, where: str) -> None:
    """Train and die at `step`: "between" saves, or during the save of `step` in the file or before its rename."""
    die = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
    saving = RunCheckpoint(run / "checkpoints", every=2)
    callbacks: list[Any] = [saving, AdapterEma(0.9), NonFiniteGuard(), Throughput()]
    if where == "between":
        callbacks.append(KillAt(step))
    elif where == "in the file":
        write = torch.save

        def half(value: Any, file: Any) -> None:
            if value["global_step"] == step:
                file.write(b"PK half of a state")
                file.flush()
                die()
            write(value, file)

        torch.save = half
    elif where == "before the rename":
        rename = os.rename

        def never(source: Any, target: Any) -> None:
            if str(target).endswith(f"step-{step:08d}"):
                die()
            rename(source, target)

        os.rename = never
    train(base, run, 20, callbacks)


def train_in_process(base: Path, run: Path, steps: int, resume: bool) -> None:
    train(base, run, steps, resume=resume)


def train_on_a_full_disk(base: Path, run: Path, limit: int) -> None:
    """Train with files limited to `limit` bytes from step 3 on, as a full disk would."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    class Fill(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            if trainer.global_step == 6:
                (run / "still-training").touch()

    train(base, run, 6, [RunCheckpoint(run / "checkpoints", every=2), AdapterEma(0.9), Fill()])


def train_with_samples(base: Path, run: Path) -> None:
    train(base, run, 2, [SampleGrid(run / "samples", ["a cat"], every=1)])
