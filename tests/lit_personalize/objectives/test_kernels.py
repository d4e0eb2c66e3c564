"""`kernels`: the same training with fused operators as without, for adapters that they read and others."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch.utils.data import DataLoader

from lit_kernels import backend
from lit_personalize.adapters.key_value_delta import KeyValueDelta
from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.oft import OFT
from lit_personalize.adapters.protocol import Adapter
from lit_personalize.adapters.token_embedding import TokenEmbedding
from lit_personalize.batch import Batch
from lit_personalize.errors import UsageError
from lit_personalize.objectives.denoising import Denoising

MakeBatch = Callable[..., Batch]
ADAPTERS: dict[str, Callable[[], list[Adapter]]] = {
    "lora": lambda: [LoRA(rank=2, alpha=3)],
    "custom diffusion": lambda: [KeyValueDelta(), TokenEmbedding("<new1>", init="cat")],
    "two": lambda: [LoRA(rank=2, targets="key_value"), LoRA(rank=3, targets="query_value", name="other", alpha=1)],
    "key value": lambda: [LoRA(rank=2, targets="key_value")],
    "dora": lambda: [LoRA(rank=2, use_dora=True)],
    "oft": lambda: [OFT()],
}


def trained(path: Path, adapters: str, make_batch: MakeBatch, **options: Any) -> dict[str, torch.Tensor]:
    """All factors after three steps on one batch, as `fit` takes them."""
    optimizer = functools.partial(torch.optim.SGD, lr=0.5)
    objective = Denoising(str(path), ADAPTERS[adapters](), optimizer=optimizer, **options)
    objective.configure_model()
    batch = make_batch(objective.built, ["a photo of <new1> cat" if adapters == "custom diffusion" else "a cat"])
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, plugins=[LightningEnvironment()],
    )  # fmt: skip
    delivered: Any = [{name: value for name, value in vars(batch).items() if value is not None}] * 3
    trainer.fit(objective, DataLoader(delivered, batch_size=None))
    return {n: v for adapter in objective.trained for n, v in adapter.snapshot().items()}


@pytest.mark.parametrize(
    ("adapters", "family", "kernels"),
    [
        ("lora", "sd1", "triton"),
        ("custom diffusion", "sdxl", "fallback"),
        ("two", "sd1", "fallback"),
        ("dora", "sd1", "fallback"),
        ("oft", "sd1", "fallback"),
    ],
)
def test_training_learns_the_same(
    tiny_bases: dict[str, Path], make_batch: MakeBatch, adapters: str, family: str, kernels: str
) -> None:
    expected = trained(tiny_bases[family], adapters, make_batch, kernels="off")
    found = trained(tiny_bases[family], adapters, make_batch, kernels=kernels)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_fused_layers_of_a_bf16_base_take_fp32_factors(tiny_bases: dict[str, Path], make_batch: MakeBatch) -> None:
    """Roundings differ, what is learned does not: the change of the factors points the same way."""
    begun = Denoising(str(tiny_bases["sd1"]), ADAPTERS["key value"]())
    begun.configure_model()
    before = {n: v for adapter in begun.trained for n, v in adapter.snapshot().items()}
    found, expected = (
        trained(tiny_bases["sd1"], "key value", make_batch, kernels=way, dtype="bfloat16")
        for way in ("fallback", "off")
    )
    one, two = (torch.cat([(after[n] - v).flatten() for n, v in before.items()]) for after in (found, expected))
    assert one.norm() > 0 and torch.nn.functional.cosine_similarity(one, two, dim=0) > 0.99


def test_no_factor_of_a_fused_layer_is_cast(tiny_bases: dict[str, Path], make_batch: MakeBatch) -> None:
    objective = Denoising(str(tiny_bases["sd1"]), [LoRA(rank=2)], dtype="bfloat16", kernels="fallback")
    objective.configure_model()
    lora: Any = objective.trained[0]
    weights = [linear.weight for layer in lora._peft.values() for linear in layer.lora_A.values()]
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    objective.fuse_kernels()
    lora.refresh(torch.bfloat16)
    weights = [linear.weight for layer in lora._peft.values() for linear in layer.lora_A.values()]
    factors = {id(factor) for factor in lora.named_factors().values()}
    assert len(weights) == 4 * 8 and {id(weight) for weight in weights} <= factors


def test_a_cpu_is_left_alone_by_default(
    tiny_bases: dict[str, Path], make_batch: MakeBatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lit_personalize")
    trained(tiny_bases["sd1"], "lora", make_batch)
    assert "kernels:" not in caplog.text
    trained(tiny_bases["sd1"], "lora", make_batch, kernels="fallback")
    assert "kernels: text_kv: 4 layers" in caplog.text


def test_what_cannot_run_here_is_said_before_the_first_step(
    tiny_bases: dict[str, Path], make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    said = "kernels: triton: Triton kernels need an NVIDIA GPU, not cpu.*kernels: off trains without them"
    with pytest.raises(UsageError, match=said):
        trained(tiny_bases["sd1"], "lora", make_batch, kernels="triton")
