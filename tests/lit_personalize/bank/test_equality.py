"""An adapter of a bank is the adapter that the single-adapter trainer makes: to 1e-10 in fp64, after 20 steps."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from solo_and_bank import Recipe, largest_difference, narrow, trained, write_pictures

from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.token_embedding import TokenEmbedding
from lit_personalize.objectives.prior_preservation import PriorPreservation

TOLERANCE = 1e-10
SEVEN = range(7)


@pytest.mark.parametrize("slots", [1, 7])
def test_bank_equals_solo(plain: Recipe, slots: int) -> None:
    jobs = [plain.job(number) for number in range(slots)]
    found = trained(plain.bank(slots), jobs)
    assert max(largest_difference(found[job.id], plain.solo(job)) for job in jobs) < TOLERANCE


def test_bank_of_32(plain: Recipe) -> None:
    """Seven of them, spread over the slots, are compared; the slow test compares all."""
    jobs = [plain.job(number) for number in [*range(7, 32)]]
    for number in SEVEN:
        jobs.insert(number * 5, plain.job(number))
    found = trained(plain.bank(32), jobs)
    assert len(found) == 32
    assert max(largest_difference(found[str(n)], plain.solo(plain.job(n))) for n in SEVEN) < TOLERANCE


@pytest.mark.slow
def test_bank_of_32_all(plain: Recipe) -> None:
    jobs = [plain.job(number) for number in range(32)]
    found = trained(plain.bank(32), jobs)
    assert max(largest_difference(found[job.id], plain.solo(job)) for job in jobs) < TOLERANCE


def test_permuted_slots(plain: Recipe) -> None:
    found = trained(plain.bank(7), [plain.job(number) for number in (4, 2, 6, 0, 5, 3, 1)])
    assert max(largest_difference(found[str(n)], plain.solo(plain.job(n))) for n in SEVEN) < TOLERANCE


def test_swap_in_mid_run(plain: Recipe) -> None:
    """Three slots, seven adapters of several lengths, rates and clips, on a schedule; the tail runs in fewer slots."""
    cosine = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=12)
    recipe = dataclasses.replace(plain, name="swap", options={"lr_scheduler": cosine})
    lengths = (6, 20, 3, 9, 5, 4, 7)
    jobs = [
        recipe.job(n, steps, lr=(None, 3e-2)[n % 2], clip=(None, 0.02, 5.0)[n % 3]) for n, steps in enumerate(lengths)
    ]
    bank = recipe.bank(3)
    found = trained(bank, jobs)
    assert bank.steps == 20  # 6+9+5, 20 and 3+4+7... side by side
    assert max(largest_difference(found[job.id], recipe.solo(job)) for job in jobs) < TOLERANCE


def test_prior_preservation(plain: Recipe, tmp_path: Path) -> None:
    """One instance and three prior pictures a step; the weighting of every role, noise offset and dropped captions."""
    write_pictures(tmp_path / "class", 5, 99)
    recipe = dataclasses.replace(
        plain, name="prior", kind=PriorPreservation, regularization=tmp_path / "class",
        adapters=lambda noun: [LoRA(rank=1, alpha=27, targets="attention", lr_ratio=4.0, init_seed=0)],
        options={"prior_weight": 0.3, "snr_gamma": 5.0, "noise_offset": 0.1, "caption_dropout": 0.3},
        data={"batch_size": 1}, per_batch=3, lr=5e-4,  # s = 27 makes larger rates chaotic, which multiplies rounding
    )  # fmt: skip
    jobs = [recipe.job(number, 10) for number in range(3)]
    found = trained(recipe.bank(2), jobs)
    assert max(largest_difference(found[job.id], recipe.solo(job)) for job in jobs) < TOLERANCE


def test_textual_inversion(plain: Recipe) -> None:
    """Tokens alone: each begins at the noun of its concept, and is held near it."""
    recipe = dataclasses.replace(
        plain, name="ti", token="<new1>", lr=1e-2,
        adapters=lambda noun: [TokenEmbedding("<new1>", noun, norm="vocabulary", norm_rate=0.5, init_weight=0.2)],
    )  # fmt: skip
    jobs = [recipe.job(number, (10, 4)[number % 2]) for number in range(4)]
    found = trained(recipe.bank(3), jobs)
    assert max(largest_difference(found[job.id], recipe.solo(job)) for job in jobs) < TOLERANCE


def test_pivotal_tuning(plain: Recipe) -> None:
    """Two rows of random start that rest after half of an adapter's steps, beside LoRA that trains for all of them."""
    recipe = dataclasses.replace(
        plain, name="pivotal", token="<s0><s1>",
        adapters=lambda noun: [
            TokenEmbedding("<s0><s1>", "RANDOM", norm="deviation", lr=0.02, weight_decay=0.0, span=(0, 0.5)),
            LoRA(rank=2, targets="key_value", text_encoder=True, init_seed=0),
        ],
    )  # fmt: skip
    jobs = [recipe.job(number, steps) for number, steps in enumerate((10, 5, 8))]
    found = trained(recipe.bank(2), jobs)
    assert max(largest_difference(found[job.id], recipe.solo(job)) for job in jobs) < TOLERANCE


def test_views_that_move(plain: Recipe) -> None:
    """Pixels of crops and mirror images, encoded in every step."""
    recipe = dataclasses.replace(plain, name="moving", side=24, data={"crop": "random", "flip": True})
    jobs = [recipe.job(number, 5) for number in range(2)]
    found = trained(recipe.bank(2), jobs)
    assert max(largest_difference(found[job.id], recipe.solo(job)) for job in jobs) < TOLERANCE


def test_sdxl(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """Two text encoders, pooled states and time ids; a token of two rows."""
    base = narrow(tiny_bases["sdxl"], tmp_path / "sdxl")
    recipe = Recipe(
        base, "sdxl", token="<new1>",
        adapters=lambda noun: [TokenEmbedding("<new1>", noun), LoRA(rank=2, init_seed=0)],
    )  # fmt: skip
    jobs = [recipe.job(number, 5) for number in range(2)]
    found = trained(recipe.bank(2), jobs)
    assert max(largest_difference(found[job.id], recipe.solo(job)) for job in jobs) < TOLERANCE
