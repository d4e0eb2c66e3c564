"""Exponential moving average of the adapters' factors, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lit_personalize.checkpoints import AVERAGED
from lit_personalize.errors import DataError, UsageError


class AdapterEma(Callback):
    """Average every trained factor over the optimizer steps: θ' ← d·θ' + (1 - d)·θ, in fp32.

    The average is saved beside the trained weights under their own names (`checkpoints.AVERAGED`); sampling and
    export use it, training never does.

    Args:
        decay: d once warmed up.
        warmup: Begin with d_n = (1 + n) / (10 + n) while that is below `decay`.
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True):
        if not 0 <= decay < 1:
            raise UsageError(f"EMA decay must be in [0, 1), not {decay}")
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self.shadow: dict[str, Tensor] = {}
        """Averages by state-dict name."""
        self._boundary = 0

    def decay_at(self, updates: int) -> float:
        """d of the update that follows `updates` earlier ones."""
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start from the initial factors, or check what the checkpoint gave back."""
        self._boundary = trainer.global_step
        trained = _trained(pl_module)
        if not self.shadow:
            self.shadow = {name: p.detach().float().clone() for name, p in trained.items()}
        if set(self.shadow) != set(trained):
            raise DataError("the checkpoint's moving average is of other adapters; use a new run name")
        self.shadow = {name: self.shadow[name].to(p.device) for name, p in trained.items()}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the average after every optimizer step."""
        if trainer.global_step == self._boundary:
            return
        self._boundary = trainer.global_step
        factors = [p.detach().float() for p in _trained(pl_module).values()]
        torch._foreach_lerp_(list(self.shadow.values()), factors, 1 - self.decay_at(self.updates))
        self.updates += 1

    @contextmanager
    def averaged(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """Put the averages into the adapters inside the block, and the trained values back after it."""
        trained = {name: p for name, p in _trained(pl_module).items() if name in self.shadow}
        before = {name: p.detach().clone() for name, p in trained.items()}
        _copy(self.shadow, trained)
        try:
            yield
        finally:
            _copy(before, trained)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the averages where exporters find them."""
        checkpoint[AVERAGED] = {name: value.clone() for name, value in self.shadow.items()}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the averages back; a run that had none begins one at the resumed step."""
        self.shadow = {name: value.clone() for name, value in checkpoint.get(AVERAGED, {}).items()}

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = state_dict["updates"]


def _trained(module: pl.LightningModule) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if name.startswith("adapters.") and p.requires_grad}


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, torch.nn.Parameter]) -> None:
    for name, parameter in target.items():
        parameter.copy_(source[name])
