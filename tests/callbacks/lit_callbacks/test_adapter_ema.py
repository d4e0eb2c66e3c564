"""The average is the formula's, in fp32, of the adapters only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tiny_training import state, train

from lit_callbacks.adapter_ema import AdapterEma
from lit_callbacks.run_checkpoint import RunCheckpoint
from lit_personalize import checkpoints


class Record(pl.Callback):
    def __init__(self) -> None:
        self.factors: list[dict[str, torch.Tensor]] = []

    def note(self, module: pl.LightningModule) -> None:
        self.factors.append({name: value.double().clone() for name, value in module.state_dict().items()})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.note(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.note(pl_module)


def test_is_the_formula(base: Path, tmp_path: Path) -> None:
    """θ'_n = d_n θ'_{n-1} + (1 - d_n) θ_n with d_n = min(decay, n / (9 + n)), from n = 1."""
    record, ema = Record(), AdapterEma(decay=0.2)
    train(base, tmp_path, 5, [record, ema])
    for name, average in ema.shadow.items():
        expected = record.factors[0][name]
        for n in range(1, 6):
            decay = min(0.2, n / (9 + n))
            expected = decay * expected + (1 - decay) * record.factors[n][name]
        torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-7)
    assert set(ema.shadow) == set(record.factors[0]), "all adapters, nothing of the base"
    assert all(average.dtype == torch.float32 for average in ema.shadow.values())


def test_block_swaps_in_and_back(base: Path, tmp_path: Path) -> None:
    ema = AdapterEma()
    _, module = train(base, tmp_path, 2, [ema])
    own = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), ema.averaged(module):
        assert all(torch.equal(value, ema.shadow[name]) for name, value in module.state_dict().items())
        raise KeyboardInterrupt
    assert all(torch.equal(value, own[name]) for name, value in module.state_dict().items())


def test_run_without_average_can_begin_one(base: Path, tmp_path: Path) -> None:
    train(base, tmp_path, 2, [RunCheckpoint(tmp_path / "checkpoints", every=2)])
    train(base, tmp_path, 4, [RunCheckpoint(tmp_path / "checkpoints", every=2), AdapterEma(0.5)], resume=True)
    assert checkpoints.AVERAGED not in state(tmp_path, 2)
    assert state(tmp_path, 4)["callbacks"]["AdapterEma"] == {"updates": 2}
