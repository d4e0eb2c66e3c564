"""Textual Inversion's options: initial rows, norm control, the pull to the start, progressive vectors, spans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch.utils.data import DataLoader

from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.protocol import Adapter
from lit_personalize.adapters.token_embedding import CLASS, RANDOM, TokenEmbedding
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.batch import Batch
from lit_personalize.errors import DataError, UsageError
from lit_personalize.objectives.denoising import Denoising

MakeBatch = Callable[..., Batch]


def attached(path: Path, seed: int = 0, **options: Any) -> tuple[Base, TokenEmbedding]:
    base = load_base(path)
    token = TokenEmbedding(**{"token": "<new1>", "init": "cat", **options})
    token.attach(base, seed)
    return base, token


def matrix(base: Base, encoder: int = 0) -> torch.Tensor:
    return base.text_encoders[encoder].get_input_embeddings().weight  # type: ignore[no-any-return]


def trained(objective: Denoising, batch: Batch, steps: int, *callbacks: pl.Callback) -> Denoising:
    """Train on one batch for some steps, as `fit` does."""
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, plugins=[LightningEnvironment()],
        callbacks=list(callbacks),
    )  # fmt: skip
    delivered: Any = [{name: value for name, value in vars(batch).items() if value is not None}] * steps
    trainer.fit(objective, DataLoader(delivered, batch_size=None))
    return objective


class Record(pl.Callback):
    """Copies of all factors after every step, as a checkpoint would take them."""

    def __init__(self) -> None:
        self.factors: list[dict[str, torch.Tensor]] = []
        self.shown: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.factors.append({n: v for adapter in pl_module.trained for n, v in adapter.snapshot().items()})
        (ids,) = pl_module.built.shown(pl_module.built.tokenize(["a <new1> cat"]))
        self.shown.append(int((ids >= pl_module.built.added_rows[0].first_id).sum()))


# ---- where rows begin -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_several_words_begin_several_rows(tiny_bases: dict[str, Path], family: str) -> None:
    base, token = attached(tiny_bases[family], init=["cat", "red", "cat"], vectors=3)
    for i, tokenizer in enumerate(base.tokenizers):
        cat, red = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("cat", "red"))
        assert torch.equal(token.rows(i), matrix(base, i)[[cat, red, cat]])


def test_random_rows_have_the_spread_of_the_vocabulary_and_come_from_the_seed(tiny_bases: dict[str, Path]) -> None:
    base, token = attached(tiny_bases["sdxl"], init=RANDOM, vectors=64)
    for i in range(2):
        wanted = float(matrix(base, i).std())
        assert float(token.rows(i).detach().std()) == pytest.approx(wanted, rel=0.1)
        assert len({tuple(row.tolist()) for row in token.rows(i)}) == 64
    assert torch.equal(attached(tiny_bases["sdxl"], init=RANDOM, vectors=64)[1].rows(1), token.rows(1))
    assert not torch.equal(attached(tiny_bases["sdxl"], 1, init=RANDOM, vectors=64)[1].rows(1), token.rows(1))
    _, mixed = attached(tiny_bases["sd1"], init=["cat", RANDOM], vectors=2)
    assert torch.equal(mixed.rows()[0], attached(tiny_bases["sd1"])[1].rows()[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": ["cat", "dog"]}, "2 initializer words for 1 vectors"),
        ({"token": "<s0><s1>", "vectors": 3}, "names 2 rows"),
        ({"norm": "vocabulary", "norm_rate": 0.0}, r"norm_rate must be in \(0, 1\]"),
        ({"init_weight": -1.0}, "must not be negative"),
        ({"unlock_every": 0}, "at least 1 step"),
        ({"span": (0.5, 0.5)}, "is empty"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TokenEmbedding(**{"token": "<new1>", "init": CLASS, **options})


# ---- what training changes --------------------------------------------------------------------------


def test_only_the_rows_change_and_the_loss_falls(tiny_bases: dict[str, Path], make_batch: MakeBatch) -> None:
    """d numbers per encoder learn one (t, ε); every other number of the base stays, bit for bit."""
    token = TokenEmbedding("<new1>", "cat")
    objective = Denoising(str(tiny_bases["sd1"]), [token], lambda groups: torch.optim.AdamW(groups, lr=0.05))
    objective.configure_model()
    before = {name: value.clone() for name, value in objective.built.state_dict().items()}
    start = token.snapshot()
    batch = make_batch(objective.built, ["a photo of a <new1>"])
    optimizer = objective.configure_optimizers()
    losses = []
    for _ in range(40):
        objective.draws = 0  # the same t and ε
        optimizer.zero_grad()
        loss = objective.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert all(b < a for a, b in zip(losses[:8], losses[1:9], strict=True)) and losses[-1] == min(losses)
    assert abs(losses[-1] - losses[-2]) < 0.05 * (losses[0] - losses[-1]), "has not come to rest"
    after = objective.built.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert sum(p.numel() for p in objective.parameters() if p.requires_grad) == 32
    assert all(not torch.equal(value, start[name]) for name, value in token.snapshot().items())


def test_the_deviation_is_drawn_to_the_vocabulary(tiny_bases: dict[str, Path]) -> None:
    """Without gradients ρ = std / σ follows ρ ← ρ^0.9."""
    base, token = attached(tiny_bases["sdxl"], token="<s0><s1>", init=RANDOM, norm="deviation")
    for i, rows in enumerate(token.factors.values()):
        with torch.no_grad():
            rows.mul_(8.0)
        sigma = matrix(base, i).std()
        for _ in range(3):
            ratio = rows.detach().std() / sigma
            direction = rows.detach() / rows.detach().norm()
            token.after_step()
            torch.testing.assert_close(rows.detach().std() / sigma, ratio**0.9)
            torch.testing.assert_close(rows.detach() / rows.detach().norm(), direction)


@pytest.mark.parametrize("norm", ["vocabulary", "initial"])
def test_norms_are_kept(tiny_bases: dict[str, Path], make_batch: MakeBatch, norm: str) -> None:
    token = TokenEmbedding("<new1>", ["cat", "red"], vectors=2, norm=norm)  # type: ignore[arg-type]
    objective = Denoising(str(tiny_bases["sd1"]), [token], lambda groups: torch.optim.AdamW(groups, lr=0.05))
    objective.configure_model()
    first = token.rows().detach().clone()
    trained(objective, make_batch(objective.built, ["a <new1> cat"]), 3)
    wanted = first.norm(dim=1) if norm == "initial" else matrix(objective.built).norm(dim=1).mean().expand(2)
    torch.testing.assert_close(token.rows().detach().norm(dim=1), wanted)
    assert bool(((token.rows() - first).abs().amax(dim=1) > 1e-3).all())


def test_the_pull_to_the_start_is_a_term_of_the_loss(tiny_bases: dict[str, Path], make_batch: MakeBatch) -> None:
    """λ·‖v - v_init‖² over both encoders, with the gradient 2·λ·(v - v_init)."""
    losses, grads = [], []
    for weight in (0.0, 0.3):
        token = TokenEmbedding("<new1>", "cat", init_weight=weight)
        objective = Denoising(str(tiny_bases["sdxl"]), [token])
        objective.configure_model()
        start = token.snapshot()
        with torch.no_grad():
            for rows in token.factors.values():
                rows.add_(0.1)
        loss = objective.training_step(make_batch(objective.built, ["a <new1> cat"]), 0)
        loss.backward()
        losses.append(loss.detach())
        grads.append([p.grad for p in token.factors.values()])
    moved = [p.detach() - start[n] for n, p in token.named_factors().items()]
    torch.testing.assert_close(losses[1] - losses[0], 0.3 * sum(m.square().sum() for m in moved), rtol=1e-4, atol=1e-6)
    for plain, pulled, m in zip(*grads, moved, strict=True):
        torch.testing.assert_close(pulled - plain, 0.6 * m, rtol=1e-4, atol=1e-6)


# ---- progressive vectors ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_hidden_rows_leave_no_gap(tiny_bases: dict[str, Path], family: str) -> None:
    """With k of n rows unlocked, a caption is that of a token of k vectors."""
    base, token = attached(tiny_bases[family], vectors=3, unlock_every=2)
    captions = ["a photo of <new1> on the beach", "a cat", "<new1>"]
    for count in (1, 2, 3):
        token.at_step(2 * (count - 1), 10)
        assert token.unlocked == count
        other, _ = attached(tiny_bases[family], vectors=count)
        for shown, wanted in zip(base.shown(base.tokenize(captions)), other.tokenize(captions), strict=True):
            assert torch.equal(shown, wanted)
        found, expected = base.condition(captions), other.condition(captions)
        assert torch.equal(found.states, expected.states)
        if expected.pooled is not None and found.pooled is not None:
            assert torch.equal(found.pooled, expected.pooled)


def test_rows_are_unlocked_one_by_one_and_rest_until_then(tiny_bases: dict[str, Path], make_batch: MakeBatch) -> None:
    token = TokenEmbedding("<new1>", "cat", vectors=3, unlock_every=2)
    decaying = lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.5)  # noqa: E731
    objective = Denoising(str(tiny_bases["sd1"]), [token], decaying)
    objective.configure_model()
    first = token.rows().detach().clone()
    record = Record()
    trained(objective, make_batch(objective.built, ["a <new1> cat"]), 6, record)
    assert record.shown == [1, 1, 2, 2, 3, 3]
    for step, factors in enumerate(record.factors):
        (rows,) = factors.values()
        moved = [not torch.equal(row, other) for row, other in zip(rows, first, strict=True)]
        assert moved == [i < record.shown[step] for i in range(3)], step
    with pytest.raises(UsageError, match="takes 5 steps, but they train for 4"):
        token.at_step(0, 4)


# ---- names of several pieces, spans -----------------------------------------------------------------


def test_a_token_of_two_pieces_is_two_rows(tiny_bases: dict[str, Path]) -> None:
    base, token = attached(tiny_bases["sdxl"], token="<s0><s1>", init=RANDOM)
    assert token.tokens == ["<s0>", "<s1>"] and token.rows(1).shape == (2, 48)
    for ids, added in zip(base.tokenize(["a photo of <s0><s1> cat"]), base.added_rows, strict=True):
        assert [i for i in ids[0].tolist() if i >= added.first_id] == [added.first_id, added.first_id + 1]
    with pytest.raises(DataError, match="names 2 rows, but has 3"):
        from lit_personalize.backbones.token_rows import row_names

        row_names("<s0><s1>", 3)


@pytest.mark.parametrize("two_stages", [False, True])
def test_nothing_moves_an_adapter_outside_its_span(
    tiny_bases: dict[str, Path], make_batch: MakeBatch, two_stages: bool
) -> None:
    """Neither moments nor decay: the rows are bit-constant from the pivot on, the factors up to it in two stages."""
    token = TokenEmbedding("<new1>", "cat", norm="deviation", init_weight=0.1, span=(0, 0.5))
    lora = LoRA(rank=2, span=(0.5, 1) if two_stages else (0, 1))
    adapters: list[Adapter] = [token, lora]
    decaying = lambda groups: torch.optim.AdamW(groups, lr=0.05, weight_decay=0.5)  # noqa: E731
    objective = Denoising(str(tiny_bases["sd1"]), adapters, decaying)
    objective.configure_model()
    record = Record()
    start = {n: v for a in adapters for n, v in a.snapshot().items()}
    trained(objective, make_batch(objective.built, ["a <new1> cat"]), 6, record)
    names = {"rows": list(token.named_factors()), "lora": [n for n in lora.named_factors() if n.endswith(":A")]}
    steps = [start, *record.factors]
    moved = {
        kind: [not all(torch.equal(a[n], b[n]) for n in own) for a, b in zip(steps, steps[1:], strict=False)]
        for kind, own in names.items()
    }
    assert moved["rows"] == [True] * 3 + [False] * 3
    assert moved["lora"] == ([False] * 3 + [True] * 3 if two_stages else [True] * 6)
    assert not token.trains_text and not objective.trains_text, "no gradient is computed for resting rows"
    objective.training_step(make_batch(objective.built, ["a <new1> cat"]), 0).backward()
    assert all(p.grad is not None for a in adapters for p in a.factors.values()), "ranks would wait for it"


def test_a_resume_that_moves_the_pivot_is_told(
    tiny_bases: dict[str, Path], make_batch: MakeBatch, caplog: pytest.LogCaptureFixture
) -> None:
    objective = Denoising(str(tiny_bases["sd1"]), [TokenEmbedding("<new1>", "cat", span=(0, 0.5))])
    objective.configure_model()
    saved: dict[str, Any] = {}
    batch = make_batch(objective.built, ["a <new1> cat"])
    trained(objective, batch, 2)
    objective.on_save_checkpoint(saved)
    assert saved["litp"]["spans"] == {"token:<new1>": [0, 1]}
    objective.on_load_checkpoint(saved)
    trained(objective, batch, 2)
    assert "when the checkpoint was written" not in caplog.text
    objective.on_load_checkpoint(saved)
    trained(objective, batch, 4)
    assert "token:<new1> trained in steps 0 to 1 when the checkpoint was written and does in 0 to 2" in caplog.text
