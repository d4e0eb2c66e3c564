"""Draws depend on (seed, purpose, step, sample) and on nothing else."""

from __future__ import annotations

import torch

from lit_personalize import randomness


def test_draws_do_not_depend_on_the_batch() -> None:
    together = randomness.normal((2, 3), 1, "noise", 5, [0, 1, 2])
    torch.testing.assert_close(randomness.normal((2, 3), 1, "noise", 5, [2]), together[2:], rtol=0, atol=0)


def test_every_part_of_the_key_matters() -> None:
    def draw(seed: int = 1, purpose: str = "a", step: int = 1, sample: int = 1) -> float:
        return float(randomness.uniform(seed, purpose, step, [sample])[0])

    draws = {draw(), draw(seed=2), draw(purpose="b"), draw(step=2), draw(sample=2), draw(step=11, sample=1)}
    assert len(draws) == 6


def test_global_generators_are_not_touched() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    randomness.normal((4,), 0, "x", 0, [0])
    randomness.integers(0, 10, 0, "x", 0, [0])
    assert torch.equal(before, torch.get_rng_state())


def test_moments() -> None:
    draws = randomness.normal((20_000,), 0, "moments", 0, [0])
    assert abs(float(draws.mean())) < 0.03 and abs(float(draws.std()) - 1) < 0.03
    counts = torch.bincount(randomness.integers(0, 4, 0, "c", 0, range(4000)), minlength=4)
    assert int(counts.min()) > 850
