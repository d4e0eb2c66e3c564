"""What a bank refuses, records and exports, and that draws and initial factors are keyed as they should be."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from solo_and_bank import Recipe, bound
from test_isolation import outcome

from lit_personalize.adapters.concept_neurons import ConceptNeurons
from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.protocol import Adapter
from lit_personalize.adapters.token_embedding import TokenEmbedding
from lit_personalize.backbones.loading import load_base
from lit_personalize.bank import AdapterJob, Bank, Pictures
from lit_personalize.bank.export import is_exported, write
from lit_personalize.errors import UsageError, VerificationError
from lit_personalize.export.loading import read_adapter
from lit_personalize.export.verify import verify
from lit_personalize.objectives.denoising import Denoising


@pytest.fixture
def single(plain: Recipe) -> Recipe:
    return dataclasses.replace(plain, name="single", dtype=torch.float32)


@pytest.mark.parametrize(
    ("adapter", "why"),
    [
        (lambda: LoRA(targets="blocks"), "is a convolution; set targets"),
        (lambda: LoRA(use_dora=True), "it has use_dora"),
        (lambda: ConceptNeurons(), "a bank trains LoRA and TokenEmbedding"),
        (lambda: TokenEmbedding("<new1>", "dog", vectors=2, unlock_every=2), "it has unlock_every"),
    ],
)
def test_adapters_that_a_bank_cannot_train(single: Recipe, adapter: Callable[[], Adapter], why: str) -> None:
    with pytest.raises(UsageError, match=f"cannot be trained in a bank: .*{why}"):
        Bank(Denoising(str(single.base), [adapter()]))


def test_optimizers_that_a_bank_cannot_use(single: Recipe) -> None:
    for factory in (torch.optim.SGD, functools.partial(torch.optim.AdamW, amsgrad=True)):
        with pytest.raises(UsageError, match="a bank trains with torch.optim.AdamW without amsgrad"):
            Bank(Denoising(str(single.base), [LoRA()], functools.partial(factory, lr=0.1)))  # type: ignore[operator]
    with pytest.raises(UsageError, match="slots and patience are at least 1, not 0"):
        Bank(Denoising(str(single.base), [LoRA()]), slots=0)


def test_initial_factors_are_shared_and_random_rows_are_not(single: Recipe) -> None:
    recipe = dataclasses.replace(
        single, token="<new1>", adapters=lambda noun: [TokenEmbedding("<new1>", "RANDOM"), LoRA(rank=1)]
    )
    banks = [recipe.bank(2, init_seed=seed) for seed in (0, 0, 5)]
    for bank in banks:
        list(bank.fill(iter(bound(bank, [recipe.job(n, 1) for n in range(2)]))))
    rows, factors = (group.master for group in banks[0].stack.groups)
    assert bool(factors.any()) and torch.equal(factors[0], factors[1]) and not torch.equal(rows[0], rows[1])
    assert torch.equal(factors, banks[1].stack.groups[1].master), "whatever the process"
    assert not torch.equal(factors, banks[2].stack.groups[1].master)
    assert torch.equal(rows, banks[2].stack.groups[0].master), "the adapter's seed is another one"


def test_token_without_a_noun_fails_its_adapter(single: Recipe) -> None:
    recipe = dataclasses.replace(single, token="<new1>", adapters=lambda noun: [TokenEmbedding("<new1>", noun)])
    bank = recipe.bank(2)
    jobs = [dataclasses.replace(recipe.job(0, 1), class_noun=""), recipe.job(1, 1)]
    found = outcome(bank, bound(bank, jobs))
    assert "give every adapter of the bank a class noun" in found["0"].failure and not found["1"].failure


def test_pictures_in_memory(single: Recipe) -> None:
    """Every picture is shown once an epoch; each adapter has its own order; captions go with their pictures."""
    base = load_base(single.base)
    draws = torch.Generator().manual_seed(0)
    prior = Pictures.encode(base, torch.rand(3, 3, 16, 16, generator=draws), ["photo of a dog"] * 3)
    pictures = [
        Pictures.encode(base, torch.rand(4, 3, 16, 16, generator=draws), [f"photo {i}" for i in "abcd"], 2, prior, seed)
        for seed in range(2)
    ]
    batches = [pictures[0].batch_of_step(step) for step in range(4)]
    assert batches[0].role.tolist() == [0, 0, 1, 1] and batches[0].position.tolist() == [0, 1, 2, 3]
    for epoch in (batches[:2], batches[2:]):
        assert sorted(i for b in epoch for i in b.sample_id[:2]) == [f"instance-{i}" for i in range(4)]
    for batch in batches:
        own = int(batch.sample_id[0][-1])
        assert torch.equal(batch.latent_mean[0], pictures[0].mean[own])  # type: ignore[index]
        assert torch.equal(batch.input_ids[0][0], base.tokenize([f"photo {'abcd'[own]}"])[0][0])  # type: ignore[index]
    orders = [[p.batch_of_step(step).sample_id for step in range(4)] for p in pictures]
    assert orders[0] != orders[1]
    bank = single.bank(2)
    jobs = [AdapterJob(str(n), functools.partial(_get, p), 2, n) for n, p in enumerate(pictures)]
    assert all(f.weights is not None for f in bank.run(jobs))


def _get(value: Any) -> Any:
    return value


def test_exports_load_in_the_stock_client(single: Recipe, tmp_path: Path) -> None:
    """Factors and rows come back; metadata name the seeds; a file that is not the adapter is found out."""
    recipe = dataclasses.replace(
        single, token="<new1>",
        adapters=lambda noun: [TokenEmbedding("<new1>", noun), LoRA(rank=2, alpha=8, targets="query_value")],
    )  # fmt: skip
    bank = recipe.bank(2, init_seed=3)
    found = outcome(bank, bound(bank, [recipe.job(n, 3) for n in range(2)]))
    files = {name: write(f, tmp_path, bank, details={"recipe": "test"}) for name, f in found.items()}
    assert is_exported(tmp_path, "0") and is_exported(tmp_path, "1") and not is_exported(tmp_path, "2")
    report = verify(files["1"], bank.objective.built, found["1"].weights, "photo of a <new1> cat")
    assert report.picture_difference is not None and {f.kind for f in report.files} == {"diffusers", "embedding"}
    record = json.loads((tmp_path / "0" / "adapter.json").read_text())
    assert (record["seed"], record["init_seed"], record["steps"], record["skipped"]) == (100, 3, 3, 0)
    with safe_open(files["0"][0].path, "pt") as file:
        assert json.loads(file.metadata()["litp.details"])["init_seed"] == 3
    back = read_adapter(files["0"][0].path, bank.objective.built)
    weights = found["0"].weights
    assert weights is not None and back.low_rank.keys() == weights.low_rank.keys()
    for factors in weights.low_rank.values():
        factors.up.mul_(1.001)
    monkey = dataclasses.replace(found["0"], weights=found["1"].weights)
    from lit_personalize.bank.export import check

    with pytest.raises(VerificationError, match="does not come back as it was trained"):
        check(files["0"][0], bank.objective.built, monkey.weights)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="cannot name a folder"):
        write(dataclasses.replace(found["1"], job=dataclasses.replace(found["1"].job, id="../x")), tmp_path, bank)
