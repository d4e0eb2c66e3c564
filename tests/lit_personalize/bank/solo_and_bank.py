"""Adapters trained alone by Lightning, as `litp fit` does, and in a bank, on the tiny base in fp64."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_datamodules.personalization import Concept, PersonalizationData, Regularization
from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.protocol import Adapter
from lit_personalize.bank import AdapterJob, Bank
from lit_personalize.fitting import quiet_lightning
from lit_personalize.objectives.denoising import Denoising

Factors = dict[str, Tensor]
SOLO: dict[Any, Factors] = {}
NOUNS = ("dog", "cat")


@dataclass(frozen=True)
class Recipe:
    """What solo runs and banks share."""

    base: Path
    name: str = "lora"
    kind: type[Denoising] = Denoising
    adapters: Callable[[str], list[Adapter]] = lambda noun: [LoRA(rank=2, targets="query_value", init_seed=0)]
    """Of a class noun; the bank's is CLASS."""
    options: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    prompt: str = "photo of a {}"
    token: str | None = None
    regularization: Path | None = None
    per_batch: int | None = None
    side: int = 16
    """Of the pictures; above the base's, views can move."""
    clip: float | None = 0.05
    dtype: torch.dtype = torch.float64
    lr: float = 1e-2

    def objective(self, seed: int, noun: str, lr: float | None = None) -> Denoising:
        optimizer = functools.partial(torch.optim.AdamW, lr=lr or self.lr, weight_decay=0.1)
        objective = self.kind(
            str(self.base), self.adapters(noun), optimizer, seed=seed, dtype=self.dtype, **self.options
        )
        return objective

    def job(self, number: int, steps: int = 20, **options: Any) -> AdapterJob:
        """The adapter of a folder with 2 + number % 3 pictures."""
        seed = 100 + number
        return AdapterJob(str(number), lambda: self.pictures(number, seed), steps, seed, NOUNS[number % 2], **options)

    def pictures(self, number: int, seed: int) -> PersonalizationData:
        """Data of one adapter, set up on a base that encodes in fp64."""
        folder = self.base.parent / f"{self.base.name}-people-{self.side}" / str(number)
        if not folder.is_dir():
            write_pictures(folder, 2 + number % 3, number, self.side)
        noun = NOUNS[number % 2]
        concept = Concept(str(folder), noun, self.token, prompt=self.prompt)
        prior = Regularization(folder=str(self.regularization), prompt=f"photo of a {noun}", per_batch=self.per_batch)
        options = {"batch_size": 2, "seed": seed, **self.data}
        return PersonalizationData([concept], regularization=prior if self.regularization else None, **options)

    def solo(self, job: AdapterJob) -> Factors:
        """Factors after the single-adapter trainer, fp64; a run that was made before is not made again."""
        key = (self.base, self.name, job.id, str(job.options()))
        if key not in SOLO:
            SOLO[key] = self._solo(job)
        return SOLO[key]

    def _solo(self, job: AdapterJob) -> Factors:
        quiet_lightning()
        objective = self.objective(job.seed, job.class_noun, job.lr)
        objective.configure_model()
        data = job.load()
        data.bind(objective.built, objective.built)
        objective.adapters.double()
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=job.steps, gradient_clip_val=job.clip or self.clip, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(objective, datamodule=data)
        return {n: p.detach() for a in objective.trained for n, p in a.named_factors().items()}

    def bank(self, slots: int, **options: Any) -> Bank:
        return Bank(self.objective(7, "CLASS"), slots, self.clip, **options)


def write_pictures(folder: Path, count: int, seed: int, side: int = 16) -> None:
    folder.mkdir(parents=True)
    draws = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(draws.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def bound(bank: Bank, jobs: Sequence[AdapterJob]) -> list[AdapterJob]:
    """The jobs, whose data is encoded by the bank's base."""

    def load(job: AdapterJob) -> PersonalizationData:
        data = job.load()
        data.bind(bank.objective.built, bank.objective.built)
        data.setup("fit")
        return data

    return [
        AdapterJob(j.id, functools.partial(load, j), j.steps, j.seed, j.class_noun, j.lr, j.weight_decay, j.clip)
        for j in jobs
    ]


def trained(bank: Bank, jobs: Sequence[AdapterJob], **options: Any) -> dict[str, Factors]:
    """Factors in fp64 of every adapter that a bank trained, by job."""
    found: dict[str, Factors] = {}
    original = bank.stack.weights

    def note(slot: int) -> Any:
        views = {n: v[slot].clone() for group in bank.stack.groups for n, v in group.views().items()}
        found[bank.slots[slot].job.id] = views
        return original(slot)

    bank.stack.weights = note  # type: ignore[method-assign]
    for finished in bank.run(bound(bank, jobs), **options):
        assert not finished.failure, finished.failure
    return found


def largest_difference(found: Factors, wanted: Factors) -> float:
    """Over all numbers; the factors must have moved, for untrained ones are alike, too."""
    assert found.keys() == wanted.keys()
    assert all(bool(value.any()) for value in wanted.values())
    return max(float((found[name] - value).abs().max()) for name, value in wanted.items())


def narrow(base: Path, folder: Path) -> Path:
    """A copy of a tiny base whose UNet is half as wide and draws 16x16 pictures: fp64 convolutions are slow."""
    from diffusers import UNet2DConditionModel

    shutil.copytree(base, folder)
    config = UNet2DConditionModel.load_config(folder / "unet")
    config |= {"block_out_channels": (16, 32), "norm_num_groups": 8, "sample_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    return folder
