"""What goes wrong in one slot stays there: every other slot is the same bit for bit, as it is in fp32."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from solo_and_bank import Factors, Recipe, bound

from lit_personalize.bank import AdapterJob, Bank, FinishedAdapter
from lit_personalize.bank.optimizer import update
from lit_personalize.batch import Batch
from lit_personalize.errors import DataError


@dataclasses.dataclass
class Spoiled:
    """Data whose steps are spoiled from one on."""

    data: Any
    spoil: Callable[[Batch], None]
    since: int
    until: int = 1000

    def batch_of_step(self, step: int) -> Batch:
        batch = Batch.of(self.data.batch_of_step(step))
        if self.since <= step < self.until:
            self.spoil(batch)
        return batch


def with_nan(batch: Batch) -> None:
    batch.latent_mean = batch.latent_mean.clone()  # type: ignore[union-attr]
    batch.latent_mean[0, 0, 0, 0] = math.nan


def with_infinity(batch: Batch) -> None:
    batch.latent_mean = torch.full_like(batch.latent_mean, math.inf)  # type: ignore[arg-type]


def unreadable(batch: Batch) -> None:
    raise DataError("people/2/0.png is damaged")


def spoiled(jobs: list[AdapterJob], number: int, spoil: Callable[[Batch], None], *span: int) -> list[AdapterJob]:
    load = jobs[number].load
    found = list(jobs)
    found[number] = dataclasses.replace(jobs[number], load=lambda: Spoiled(load(), spoil, *span))
    return found


def outcome(bank: Bank, jobs: Iterable[AdapterJob]) -> dict[str, FinishedAdapter]:
    return {finished.job.id: finished for finished in bank.run(jobs)}


def factors(finished: FinishedAdapter) -> Factors:
    assert finished.weights is not None
    pairs = {n: (f.down, f.up) for n, f in finished.weights.low_rank.items()}
    tokens = {t: rows[0] for t, rows in finished.weights.tokens.items()}
    return {f"{n}:{i}": part for n, pair in pairs.items() for i, part in enumerate(pair)} | tokens


def same(one: FinishedAdapter, two: FinishedAdapter) -> bool:
    a, b = factors(one), factors(two)
    return one.losses == two.losses and all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())


@pytest.fixture
def single(plain: Recipe) -> Recipe:
    return dataclasses.replace(plain, name="single", dtype=torch.float32)


@pytest.mark.parametrize("spoil", [with_nan, with_infinity])
def test_poisoned_slot_leaves_all_others_bit_identical(single: Recipe, spoil: Callable[[Batch], None]) -> None:
    """Two steps of adapter 1 are spoiled: they are left out and counted, and it goes on."""
    banks = [single.bank(3) for _ in range(2)]
    clean = outcome(banks[0], bound(banks[0], [single.job(n, 6) for n in range(3)]))
    jobs = spoiled(bound(banks[1], [single.job(n, 6) for n in range(3)]), 1, spoil, 2, 4)
    found = outcome(banks[1], jobs)
    assert same(found["0"], clean["0"]) and same(found["2"], clean["2"])
    assert found["1"].skipped == 2 and not found["1"].failure
    assert [math.isfinite(loss) for loss in found["1"].losses] == [True, True, False, False, True, True]
    assert all(bool(torch.isfinite(part).all()) for part in factors(found["1"]).values())
    assert not same(found["1"], clean["1"])


def test_skipped_steps_change_nothing_of_the_slot(single: Recipe) -> None:
    bank = single.bank(2)
    jobs = spoiled(bound(bank, [single.job(n, 4) for n in range(2)]), 1, with_nan, 2, 4)
    seen = []

    def note(bank: Bank) -> None:
        if bank.slots:
            group = bank.stack.groups[0]
            seen.append([getattr(group, kind)[1].clone() for kind in ("master", "m", "v", "steps")])

    list(bank.run(jobs, note))
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True)), "step 2 was left out"
    assert not torch.equal(seen[0][0], seen[1][0])


def test_failed_slot_is_given_to_the_next_job(single: Recipe) -> None:
    """Adapter 1 fails at step 3 for good; adapter 3 takes its place; 0 and 2 do not notice any of it."""
    banks = [single.bank(3, patience=2) for _ in range(2)]
    steps = (7, 4, 7, 3)  # without the failure, adapter 3 begins when adapter 1 ends, after the same four steps
    clean = outcome(banks[0], bound(banks[0], [single.job(n, s) for n, s in enumerate(steps)]))
    jobs = spoiled(bound(banks[1], [single.job(n, s) for n, s in enumerate((7, 50, 7, 3))]), 1, with_nan, 2)
    found = outcome(banks[1], jobs)
    assert found["1"].weights is None
    assert "the loss was not finite in 2 steps in a row, up to step 3" in found["1"].failure
    assert all(same(found[name], clean[name]) for name in "023")


def test_rate_that_explodes_fails_its_adapter_only(single: Recipe) -> None:
    banks = [single.bank(2, patience=3) for _ in range(2)]
    clean = outcome(banks[0], bound(banks[0], [single.job(n, 8) for n in range(2)]))
    jobs = bound(banks[1], [single.job(0, 8), dataclasses.replace(single.job(1, 8), lr=1e30)])
    found = outcome(banks[1], jobs)
    assert "not finite in 3 steps in a row" in found["1"].failure
    early = len(found["1"].losses)
    assert found["0"].losses[:early] == clean["0"].losses[:early]
    assert not found["0"].failure and found["0"].skipped == 0


def test_data_that_cannot_be_read_fails_its_adapter_only(single: Recipe) -> None:
    """Before its first step, in the midst of it, and because its steps have another shape."""
    bank = single.bank(2)
    jobs = bound(bank, [single.job(n, 4) for n in range(4)])
    jobs = spoiled(spoiled(jobs, 1, unreadable, 2), 2, unreadable, 0)
    other = dataclasses.replace(single, data={"batch_size": 1}).job(4, 4)
    found = outcome(bank, [*jobs, *bound(bank, [other])])
    assert [found[n].failure for n in "12"] == ["people/2/0.png is damaged"] * 2
    assert "a step has 1 samples of [4, 8, 8], the bank's slots have 2" in found["4"].failure
    assert not found["0"].failure and not found["3"].failure and len(found["3"].losses) == 4


def test_infinite_loss_with_a_finite_gradient_is_left_out(single: Recipe) -> None:
    """The squared error overflows before its gradient does."""
    bank = single.bank(2)
    list(bank.fill(iter(bound(bank, [single.job(n, 4) for n in range(2)]))))
    group = bank.stack.groups[0]
    before = group.master.clone()
    skipped = update(bank.stack, bank.slots, [torch.ones_like(before)], torch.tensor([1.0, math.inf]), [1.0, 1.0])
    assert skipped.tolist() == [False, True] and group.steps.tolist() == [1, 0]
    assert torch.equal(group.master[1], before[1]) and not torch.equal(group.master[0], before[0])
