"""A checkpoint is the adapter, Adam's two moments, an average where one is kept, and little else."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch

from lit_callbacks.adapter_ema import AdapterEma
from lit_callbacks.non_finite_guard import NonFiniteGuard
from lit_callbacks.run_checkpoint import RunCheckpoint
from lit_personalize import checkpoints
from lit_personalize.adapters.key_value_delta import KeyValueDelta
from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.oft import OFT
from lit_personalize.adapters.protocol import Adapter
from lit_personalize.adapters.token_embedding import TokenEmbedding
from lit_personalize.objectives.denoising import Denoising

ALLOWED = 256 * 1024
ADAPTERS: dict[str, Any] = {
    "LoRA": lambda: [LoRA(rank=4)],
    "LoRA on every layer": lambda: [LoRA(rank=1, targets="blocks", text_encoder="blocks")],
    "OFT": lambda: [OFT()],
    "Custom Diffusion": lambda: [KeyValueDelta(), TokenEmbedding("<new1>", "cat")],
    "Textual Inversion": lambda: [TokenEmbedding("<new1>", "cat")],
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("averaged", [False, True])
def test_a_checkpoint_is_small(name: str, averaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def objective(base: Path, lr: float) -> Denoising:
        adapters: list[Adapter] = ADAPTERS[name]()
        return Denoising("tinyworld", adapters, optimizer=functools.partial(torch.optim.AdamW, lr=lr))

    monkeypatch.setattr(tiny_training, "objective", objective)
    monkeypatch.setattr(tiny_training.Loader, "channels", 8)
    callbacks = [RunCheckpoint(tmp_path / "checkpoints", every=1), NonFiniteGuard()]
    tiny_training.train(tmp_path, tmp_path, 1, [*callbacks, *([AdapterEma(0.9)] if averaged else [])])
    found = checkpoints.find_complete(tmp_path / "checkpoints")
    assert found is not None
    adapter = sum(tensor.nbytes for tensor in checkpoints.load_state(found.path).values())
    size = sum(file.stat().st_size for file in found.path.rglob("*"))
    assert size <= (4 + averaged) * adapter + ALLOWED, f"{size} bytes for an adapter of {adapter}"
