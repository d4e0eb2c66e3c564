"""Whole steps of an objective: building in any context, fresh weights in validation, gradients of tokens, K and V."""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch.utils.data import DataLoader

from lit_personalize.adapters.key_value_delta import KeyValueDelta
from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.protocol import Adapter
from lit_personalize.adapters.token_embedding import TokenEmbedding
from lit_personalize.batch import Batch
from lit_personalize.objectives.denoising import Denoising

MakeBatch = Callable[..., Batch]


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_model_is_built_whole_in_any_context(tiny_bases: dict[str, Path], device: str) -> None:
    """Strategies call `configure_model` under a device context, more than once, and global draws stay as they were."""
    objective = Denoising(str(tiny_bases["sd1"]), [LoRA(rank=2, text_encoder=True), KeyValueDelta()])
    before = torch.get_rng_state()
    with torch.device(device):
        objective.configure_model()
    base, adapters = objective.built, list(objective.trained)
    assert torch.equal(torch.get_rng_state(), before)
    tensors = [*base.state_dict().values(), *objective.state_dict().values(), base.schedule.alphas_cumprod]
    assert {t.device.type for t in tensors} == {"cpu"} and objective.state_dict()
    with torch.device(device):
        objective.configure_model()
    assert objective.built is base and objective.trained == adapters == base.adapters
    with torch.no_grad():
        states = base.condition(["a cat"])
        assert bool(base.predict(torch.zeros(1, 4, 16, 16), torch.tensor([9]), states).isfinite().all())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [KeyValueDelta, lambda: LoRA(rank=2)], ids=["key_value", "lora"])
def test_validation_sees_the_newest_weights(
    tiny_bases: dict[str, Path], make_batch: MakeBatch, make: Callable[[], Adapter], dtype: str
) -> None:
    """`val_loss` after a step is the loss of the factors that the step left, not of those it began with."""
    optimizer = functools.partial(torch.optim.SGD, lr=20.0)
    objective = Denoising(str(tiny_bases["sd1"]), [make()], optimizer=optimizer, dtype=dtype)
    objective.configure_model()
    batch = make_batch(objective.built, ["a photo of a cat", "a dog"])
    with torch.no_grad():
        untrained = float(objective.loss(batch, 0).reduce())
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=2, val_check_interval=2, num_sanity_val_steps=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        plugins=[LightningEnvironment()],
    )  # fmt: skip
    delivered: Any = [{name: value for name, value in vars(batch).items() if value is not None}]
    trainer.fit(objective, DataLoader(delivered * 2, batch_size=None), DataLoader(delivered, batch_size=None))
    with torch.no_grad():
        for adapter in objective.trained:
            adapter.refresh(objective.built.dtype)
        newest = float(objective.loss(batch, 0).reduce())
    assert abs(newest - untrained) > 1e-3, "the steps changed nothing that could be seen"
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(newest, rel=1e-6)


class StopAt(pl.Callback):
    """Note what every step saw and lost; end the training after step 5, as a time limit would."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.batches: list[object] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.losses.append(float(outputs["loss"]))
        self.batches.append(batch)
        trainer.should_stop = trainer.global_step >= 5


def test_loggers_get_the_loss_of_their_own_step(
    tiny_bases: dict[str, Path], make_batch: MakeBatch, tmp_path: Path
) -> None:
    """Every second step and the one that training is ended after, each with its own loss."""
    objective = Denoising(str(tiny_bases["sd1"]), [LoRA(rank=2)])
    objective.configure_model()
    batch = make_batch(objective.built, ["a photo of a cat", "a dog"])
    delivered: Any = [{name: value for name, value in vars(batch).items() if value is not None}]
    watch = StopAt()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=8, min_epochs=0, logger=CSVLogger(tmp_path), log_every_n_steps=2,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[watch],
        plugins=[LightningEnvironment()],
    )  # fmt: skip
    trainer.fit(objective, DataLoader(delivered * 8, batch_size=None))
    with (Path(str(trainer.log_dir)) / "metrics.csv").open(encoding="utf-8") as file:
        written = {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}
    assert len(set(watch.losses)) == len(watch.losses) == 5
    assert written == pytest.approx({step: watch.losses[step] for step in (1, 3, 4)}, rel=1e-6)
    assert all(isinstance(b, Batch) for b in watch.batches), "the batch is built once, for the callbacks, too"


def _gradients(objective: Denoising, batch: Batch) -> None:
    objective.zero_grad()
    objective.training_step(batch, 0).backward()


@pytest.mark.parametrize("captions", [["a <new1> cat", "a <new2> dog"], ["a <new1> cat and a <new2> dog"]])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_every_token_of_a_step_learns(
    tiny_bases: dict[str, Path], make_batch: MakeBatch, family: str, captions: list[str]
) -> None:
    """The last of several tokens, too, in one caption or in several; a token that no caption has gets nothing."""
    tokens = [TokenEmbedding("<new1>", "cat", vectors=2), TokenEmbedding("<new2>", "dog"), TokenEmbedding("<no>", "a")]
    objective = Denoising(str(tiny_bases[family]), [*tokens, KeyValueDelta()])
    objective.configure_model()
    _gradients(objective, make_batch(objective.built, captions))
    for token in tokens:
        for name, rows in token.named_factors().items():
            assert rows.grad is not None
            moved = rows.grad.abs().amax(dim=1)
            assert bool((moved == 0).all() if token.token == "<no>" else (moved > 0).all()), name


@pytest.mark.parametrize("detach", [True, False])
def test_the_start_token_gives_no_gradient_to_key_and_value(
    tiny_bases: dict[str, Path], make_batch: MakeBatch, detach: bool
) -> None:
    """dΔ = Σ_t dK_tᵀ c_t without t = 0 (Custom Diffusion), and with it where `detach_first_token` is off."""
    adapter = KeyValueDelta(detach_first_token=detach)
    objective = Denoising(str(tiny_bases["sd1"]), [adapter])
    objective.configure_model()
    processors = objective.built.processors.values()
    assert [p.detach_first_token for p in processors] == [detach and p.is_cross for p in processors]
    assert any(p.is_cross for p in processors)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(layer: str, module: torch.nn.Module, args: tuple[torch.Tensor], out: torch.Tensor) -> None:
        out.retain_grad()
        seen[layer] = (args[0].detach(), out)

    for layer in adapter.layers():
        linear = objective.built.unet.get_submodule(layer.removeprefix("unet."))
        linear.register_forward_hook(functools.partial(keep, layer))
    _gradients(objective, make_batch(objective.built, ["a photo of a cat", "a dog"]))
    assert set(seen) == set(adapter.layers())
    for layer, (text, out) in seen.items():
        (factor,) = (p for name, p in adapter.named_factors().items() if name == layer)
        assert out.grad is not None and factor.grad is not None
        first, rest = out.grad[:, 0].abs().max(), out.grad[:, 1:].abs().max()
        assert rest > 0 and (first == 0 if detach else first > 0), layer
        start = 1 if detach else 0
        expected = torch.einsum("bto,bti->oi", out.grad[:, start:], text[:, start:])
        torch.testing.assert_close(factor.grad, expected, atol=1e-6, rtol=1e-4)
