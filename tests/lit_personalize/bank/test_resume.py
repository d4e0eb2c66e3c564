"""A bank that is saved between steps and taken up by a new one goes on bit for bit."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from solo_and_bank import Recipe, bound, largest_difference, trained
from test_isolation import outcome, same

from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.token_embedding import TokenEmbedding
from lit_personalize.bank import Bank, FinishedAdapter, checkpoint
from lit_personalize.errors import DataError

LENGTHS = (5, 9, 3, 4)


class StopError(Exception):
    pass


@pytest.fixture(scope="module")
def recipe(plain: Recipe) -> Recipe:
    """Everything that has a state: two groups, rows with constants, a schedule."""
    cosine = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=12)
    return dataclasses.replace(
        plain, name="resumed", token="<new1>", dtype=torch.float32, options={"lr_scheduler": cosine},
        adapters=lambda noun: [TokenEmbedding("<new1>", noun, norm="initial", span=(0, 0.7)), LoRA(rank=1)],
    )  # fmt: skip


def interrupted(recipe: Recipe, folder: Path, at: int) -> dict[str, FinishedAdapter]:
    """What finished before step `at`, after which the bank is saved and dies."""
    bank, found = recipe.bank(2), {}

    def stop(bank: Bank) -> None:
        if bank.steps == at:
            checkpoint.save(bank, folder)
            raise StopError

    with pytest.raises(StopError):
        for finished in bank.run(bound(bank, [recipe.job(n, s) for n, s in enumerate(LENGTHS)]), stop):
            found[finished.job.id] = finished
    return found


def test_resume_is_bitwise(recipe: Recipe, tmp_path: Path) -> None:
    whole = recipe.bank(2)
    wanted = outcome(whole, bound(whole, [recipe.job(n, s) for n, s in enumerate(LENGTHS)]))
    found = interrupted(recipe, tmp_path, 6)
    assert set(found) == {"0"}
    bank = recipe.bank(2)
    assert checkpoint.restore(bank, tmp_path) == ["2", "1"]
    jobs = [recipe.job(n, LENGTHS[n]) for n in (1, 3, 2)]  # in any order; without those that are done
    found |= outcome(bank, bound(bank, jobs))
    assert bank.steps == whole.steps
    assert all(same(found[name], wanted[name]) for name in wanted)


def test_resumed_adapter_equals_solo(plain: Recipe, tmp_path: Path) -> None:
    """In fp64, against the single-adapter trainer, which never stopped."""

    def stop(bank: Bank) -> None:
        if bank.steps == 11:
            checkpoint.save(bank, tmp_path)
            raise StopError

    jobs = [plain.job(number) for number in range(3)]
    bank = plain.bank(3)
    with pytest.raises(StopError):
        list(bank.run(bound(bank, jobs), stop))
    bank = plain.bank(3)
    checkpoint.restore(bank, tmp_path)
    found = trained(bank, jobs)
    assert max(largest_difference(found[job.id], plain.solo(job)) for job in jobs) < 1e-10


def test_state_of_other_things_is_refused(recipe: Recipe, plain: Recipe, tmp_path: Path) -> None:
    interrupted(recipe, tmp_path, 2)
    with pytest.raises(DataError, match="of other adapters"):
        checkpoint.restore(plain.bank(2), tmp_path)
    with pytest.raises(DataError, match="begun with init_seed 0, not 1"):
        checkpoint.restore(recipe.bank(2, init_seed=1), tmp_path)
    bank = recipe.bank(2)
    checkpoint.restore(bank, tmp_path)
    with pytest.raises(DataError, match="trains 0, 1, which is not among the jobs"):
        list(bank.run(bound(bank, [recipe.job(2, 3)])))
    bank = recipe.bank(2)
    checkpoint.restore(bank, tmp_path)
    with pytest.raises(DataError, match="adapter 0 was begun with other steps"):
        list(bank.run(bound(bank, [recipe.job(0, 6), recipe.job(1, 9)])))
    bank = recipe.bank(2)
    bank.objective.built.fingerprint = "other"
    with pytest.raises(DataError, match="trained on base"):
        checkpoint.restore(bank, tmp_path)


def test_damaged_state_is_passed_over(recipe: Recipe, tmp_path: Path) -> None:
    interrupted(recipe, tmp_path, 1)
    interrupted(recipe, tmp_path, 2)
    newest = tmp_path / "step-00000002" / "state.ckpt"
    newest.write_bytes(newest.read_bytes()[:-10])
    bank = recipe.bank(2)
    assert checkpoint.restore(bank, tmp_path) == ["0", "1"] and bank.steps == 1
