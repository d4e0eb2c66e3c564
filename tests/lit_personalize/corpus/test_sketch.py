"""Sketches of ΔW: what the split into factors cannot change, and what a linear model needs of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_personalize.adapters.protocol import AdapterWeights, LowRank
from lit_personalize.corpus.layout import Layout
from lit_personalize.corpus.sketch import Sketched
from lit_personalize.corpus.store import Corpus

IN, OUT, LAYERS = 24, 16, [f"unet.blocks.{i}.attn.to_q" for i in range(8)]


def corpus_of(folder: Path, adapters: list[AdapterWeights], labels: Tensor | None = None, **options: object) -> Corpus:
    given = {"base_fingerprint": "base", "init_seed": None, "dtype": "float32", **options}
    corpus = Corpus.create(folder, Layout.of(adapters[0]), **given)  # type: ignore[arg-type]
    records = [{"id": f"a{i}"} for i in range(len(adapters))]
    if labels is not None:
        records = [{**r, "labels": {"hat": float(y)}} for r, y in zip(records, labels, strict=True)]
    corpus.append(torch.stack([corpus.layout.flatten(a) for a in adapters]), records)
    return corpus


def drawn(rank: int, seed: int = 0, alpha: float = 3.0) -> AdapterWeights:
    draws = torch.Generator().manual_seed(seed)
    return AdapterWeights(
        low_rank={
            layer: LowRank(torch.randn(rank, IN, generator=draws), torch.randn(OUT, rank, generator=draws), alpha)
            for layer in LAYERS
        }
    )


@pytest.mark.parametrize("rank", [1, 3])
def test_another_split_of_the_same_change(tmp_path: Path, rank: int) -> None:
    """Scaled, mirrored and turned factors have other numbers and the same sketch."""
    own, turned = drawn(rank), drawn(rank)
    turn = torch.linalg.qr(torch.randn(rank, rank))[0] * -5.0
    for factors in turned.low_rank.values():
        factors.down, factors.up = turn @ factors.down, factors.up @ torch.linalg.inv(turn)
    corpus = corpus_of(tmp_path / "c", [own, turned, drawn(rank, 1)])
    a, b, other = Sketched(corpus, 32).gather([0, 1, 2])
    assert float((a - b).norm() / a.norm()) < 1e-5 < 0.5 < float((a - other).norm() / a.norm())
    rows = corpus.gather([0, 1])
    assert float((rows[0] - rows[1]).norm() / rows[0].norm()) > 0.5


@pytest.mark.parametrize("rank", [1, 3])
def test_a_sketch_is_linear_in_the_change_and_keeps_its_size(tmp_path: Path, rank: int) -> None:
    """It is s·uᵀΔWv to the bit's precision; over many pairs, squared norms and inner products are those of ΔW."""
    adapters = [drawn(rank), drawn(rank, 1)]
    corpus = corpus_of(tmp_path / "c", adapters)
    sketched = Sketched(corpus, 4096)
    assert sketched.width == 8 * 4096 and len(sketched) == 2
    found = sketched.gather([0, 1])
    changes = torch.stack([torch.cat([a.delta(layer).flatten() for layer in corpus.layout.layers]) for a in adapters])
    wanted = changes @ changes.T
    assert float(((found @ found.T) - wanted).abs().max() / wanted.max()) < 0.05
    both = AdapterWeights(
        low_rank={n: f.concatenate(adapters[1].low_rank[n]) for n, f in adapters[0].low_rank.items()}
    )
    summed = Sketched(corpus_of(tmp_path / "sum", [both]), 4096)
    torch.testing.assert_close(summed.row("a0"), found[0] + found[1], rtol=1e-3, atol=1e-3)


def test_it_is_read_like_a_corpus(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "c", [drawn(1, seed) for seed in range(7)], torch.arange(7), shard_rows=3)
    sketched = Sketched(corpus, 8)
    blocks = list(sketched.blocks(2))
    assert [len(block) for block in blocks] == [2, 2, 2, 1]
    torch.testing.assert_close(torch.cat(blocks), sketched.gather(range(7)))
    torch.testing.assert_close(sketched.row("a5"), sketched.gather([5])[0])
    assert torch.equal(sketched.labels()["hat"], torch.arange(7.0)) and sketched.ids == corpus.ids
    again, other = Sketched(Corpus.open(tmp_path / "c"), 8), Sketched(corpus, 8, seed=1)
    assert torch.equal(again.row("a0"), sketched.row("a0")) and again.fingerprint == sketched.fingerprint
    assert not torch.allclose(other.row("a0"), sketched.row("a0")) and other.fingerprint != sketched.fingerprint


def trained(begun: Tensor, change: Tensor, steps: int = 15, lr: float = 0.5) -> tuple[Tensor, Tensor]:
    """Factors `[n, 1, in]`, `[n, out, 1]` by gradient descent on ‖BA - change‖² from (A0, 0), as LoRA begins."""
    down, up = begun.clone(), torch.zeros(len(begun), OUT, 1)
    for _ in range(steps):
        residue = up @ down - change
        down, up = down - lr * (up.mT @ residue), up - lr * (residue @ down.mT)
    return down, up


def adapters_of(labels: Tensor, shared: bool) -> list[AdapterWeights]:
    """Rank-1 adapters whose wanted change has a planted direction with the label's sign, and as much of their own."""
    draws = torch.Generator().manual_seed(1)
    n = len(labels)
    found = [AdapterWeights() for _ in range(n)]
    for layer in LAYERS:
        planted = torch.randn(OUT, 1, generator=draws) @ torch.randn(1, IN, generator=draws)
        own = torch.randn(n, OUT, IN, generator=draws)
        change = 0.05 * (planted * labels[:, None, None] + own)
        begun = torch.randn(1 if shared else n, 1, IN, generator=draws).expand(n, 1, IN)
        down, up = trained(begun / IN**0.5, change)
        for i, adapter in enumerate(found):
            adapter.low_rank[layer] = LowRank(down[i], up[i], 1.0)
    return found


def held_out_accuracy(rows: Tensor, labels: Tensor, train: int) -> float:
    """Of a ridge classifier on standardised columns."""
    mean, deviation = rows[:train].mean(0), rows[:train].std(0).clamp(min=1e-12)
    z = (rows - mean) / deviation
    gram = z[:train] @ z[:train].T
    dual = torch.linalg.solve(gram + 0.1 * gram.diag().mean() * torch.eye(train), labels[:train])
    return float(((z[train:] @ z[:train].T @ dual).sign() == labels[train:]).float().mean())


def test_gauge(tmp_path: Path) -> None:
    """A linear model reads an attribute of the factors only where all began from one A; of sketches in both cases."""
    labels = torch.randint(0, 2, (600,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    accuracy = {}
    for shared in (True, False):
        seed = 0 if shared else None
        corpus = corpus_of(tmp_path / str(shared), adapters_of(labels, shared), labels, init_seed=seed, dtype="float16")
        for kind, rows in (("factors", corpus), ("sketches", Sketched(corpus, 32))):
            accuracy[shared, kind] = held_out_accuracy(torch.cat(list(rows.blocks(256))), corpus.labels()["hat"], 400)
    assert accuracy[True, "factors"] >= 0.95, accuracy
    assert 0.4 <= accuracy[False, "factors"] <= 0.6, accuracy
    assert min(accuracy[True, "sketches"], accuracy[False, "sketches"]) >= 0.95, accuracy
