"""What adapters of a corpus of critters have learned: pictures drawn of them, read by the reader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import Namespace

from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.backbones.loading import load_base
from lit_personalize.bank import AdapterJob, Bank, Pictures
from lit_personalize.configuration import parse
from lit_personalize.export.loading import load_adapter
from lit_personalize.objectives.denoising import Denoising
from lit_personalize.report.measures import OPTIONS
from lit_personalize.sampling.sampler import generate
from lit_personalize.tinyworld.attributes import Reading
from lit_personalize.tinyworld.concepts import Subject, subject_pictures
from lit_personalize.tinyworld.identities import TRAINING_SEED, WORD, captions_of
from lit_personalize.tinyworld.suite import prompts_of
from lit_personalize.tinyworld.vocabulary import COLORS, CRITTER_ATTRIBUTES

RECIPE = "weights2weights/tinyworld"
ENOUGH = len(CRITTER_ATTRIBUTES) - 1
"""Parts of eight that must be read as they are for a critter to be found."""
PICTURES = 10
PROMPTS = 4


def found(reading: Reading, subject: Subject) -> bool:
    """Whether a picture shows the subject: a critter of its colour, and at least seven of eight parts right."""
    right = sum(reading[f"critter_{a}"] == subject.attributes[f"critter_{a}"] for a in CRITTER_ATTRIBUTES)
    return reading["kind"] == "critter" and reading["color"] == subject.attributes["color"] and right >= ENOUGH


def prompts_for(subject: Subject, count: int = PROMPTS) -> tuple[list[str], list[str]]:
    """Prompts before plain backgrounds from which the subject stands out, and the backgrounds."""
    asked = [(text, ground) for text, ground in prompts_of(subject, WORD) if ground in COLORS][:count]
    return [f"photo of {text}" for text, _ in asked], [ground for _, ground in asked]


def seeds_of(prompts: Sequence[str], seed: int) -> list[int]:
    return [1000 * seed + number for number in range(len(prompts))]


def drawn_from_files(files: Sequence[Path], prompts: Sequence[str], seed: int) -> np.ndarray:
    """One picture of each prompt by exported files, on a base of their own."""
    base = load_base("tinyworld")
    return generate(base, prompts, seeds_of(prompts, seed), [load_adapter(files, base)], OPTIONS)


@dataclass
class Painter:
    """A base with one LoRA, into which adapters of a corpus are put to draw them."""

    objective: Denoising

    @classmethod
    def of_recipe(cls, recipe: str = RECIPE) -> Painter:
        """The recipe's base and LoRA."""
        parser, config = parse(["-c", recipe, "--name", "unused"])
        objective = parser.instantiate(Namespace(model=config.clone()["model"])).model
        objective.configure_model()
        return cls(objective)

    @property
    def lora(self) -> LoRA:
        (lora,) = (adapter for adapter in self.objective.trained if isinstance(adapter, LoRA))
        return lora

    def draw(self, weights: AdapterWeights, prompts: Sequence[str], seed: int = 0, negative: str = "") -> np.ndarray:
        """One picture of each prompt, uint8 `[N, 64, 64, 3]`."""
        base = self.objective.built
        factors: dict[str, torch.Tensor] = {}
        own = self.lora.export_weights().low_rank
        for layer, low_rank in weights.low_rank.items():  # files may hold alpha in B
            factors[f"{layer}:A"] = low_rank.down
            factors[f"{layer}:B"] = low_rank.up * (low_rank.alpha / own[layer].alpha)
        self.lora.restore(factors)
        return generate(base, prompts, seeds_of(prompts, seed), [self.lora], replace(OPTIONS, negative=negative))


def train(
    recipe: Denoising, subjects: Sequence[Subject], at: Sequence[int], pictures: int = PICTURES, batch: int = 2,
    clip: float | None = 1.0, seed: int | None = TRAINING_SEED, slots: int = 16,
) -> Iterator[tuple[int, dict[str, AdapterWeights]]]:  # fmt: skip
    """Train subjects in a bank; gives (steps, adapters by name) at each number of steps in `at`.

    Args:
        seed: Of the draws of all; None gives each its own.
    """
    for start in range(0, len(subjects), slots):
        part = subjects[start : start + slots]
        bank = Bank(recipe, len(part), clip)
        base = bank.objective.built

        def encoded(number: int, subject: Subject, base: Any = base) -> Pictures:
            shown = subject_pictures(subject, pictures, number)
            pixels = torch.from_numpy(shown.pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
            return Pictures.encode(base, pixels, captions_of(subject, [s.background for s in shown.scenes]), batch)

        jobs = [
            AdapterJob(s.name, partial(encoded, start + n, s), max(at), start + n if seed is None else seed)
            for n, s in enumerate(part)
        ]
        list(bank.fill(iter(jobs)))
        for step in range(1, max(at) + 1):
            bank.step()
            if step in at:
                yield step, {slot.job.id: bank.stack.weights(n) for n, slot in enumerate(bank.slots)}
