"""Stop before a NaN or infinity reaches the weights, and name the step and the files it came from."""

from __future__ import annotations

import logging
import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lit_personalize.batch import Batch
from lit_personalize.errors import NonFiniteError, UsageError
from lit_personalize.sharding import local

log = logging.getLogger(__name__)
LISTED = 8
"""Sample ids in a message."""
SMALL = 1 << 18
"""Elements below which a tensor is copied together with others; larger ones are read in place."""


class NonFiniteGuard(Callback):
    """Check losses and gradients of every optimizer step, before it is taken.

    Adapters are looked at where one of these is wrong, and at the end; a checkpoint never holds broken ones.

    Args:
        skip_budget: Steps that may be left out in the whole run, weights and optimizer untouched; then it is an error.
    """

    def __init__(self, skip_budget: int = 0):
        if skip_budget < 0:
            raise UsageError(f"skip_budget must not be negative, but is {skip_budget}")
        self.skip_budget = skip_budget
        self.skipped: list[int] = []
        """Steps left out so far."""
        self._losses: list[Tensor] = []
        self._samples: list[list[str]] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note whose turn it is."""
        self._samples.append(list(Batch.of(batch).sample_id))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Keep the loss; it is read once per optimizer step."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Judge the step with one transfer from the device; leave it out or stop."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        losses, samples = self._losses, self._samples
        self._losses, self._samples = [], []
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None  # it handles infinite gradients itself
        gradients = [] if scaled else [p.grad for p in parameters if p.grad is not None]
        values = torch.stack([*losses, _largest(gradients).to(losses[0])]).tolist()
        wrong = _judge(values[:-1], values[-1])
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(wrong is not None, all=False):
            wrong = wrong or "another rank met a non-finite value"
        if wrong is None:
            return
        broken = not math.isfinite(float(_largest(parameters)))
        if broken:
            wrong = "the adapters are not finite, the step before must have broken them"
        guilty = [ids for value, ids in zip(values, samples, strict=False) if not math.isfinite(value)] or samples
        step = trainer.global_step
        message = f"step {step}: {wrong}; batch: {_listed([i for ids in guilty for i in ids])}"
        if broken or len(self.skipped) >= self.skip_budget:
            if self.skip_budget:
                message += f" ({len(self.skipped)} of {self.skip_budget} allowed steps were skipped)"
            raise NonFiniteError(f"{message}. Lower the learning rate, train in bf16 or fp32, and look at these files")
        self.skipped.append(step)
        for parameter in parameters:
            parameter.grad = None  # optimizers pass over parameters without one
        log.warning("%s; skipped (%d of %d)", message, len(self.skipped), self.skip_budget)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last step has no successor that would check what it left."""
        parameters = [p for p in pl_module.parameters() if p.requires_grad]
        wrong = not math.isfinite(float(_largest(parameters)))
        if trainer.world_size > 1:
            wrong = trainer.strategy.reduce_boolean_decision(wrong, all=False)
        if wrong:
            raise NonFiniteError(f"step {trainer.global_step}: the last step left adapters that are not finite")

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": list(self.skipped)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = list(state_dict["skipped"])


@torch.no_grad()
def _largest(tensors: list[Any]) -> Tensor:
    """The largest magnitude of all, NaN or infinite if one of them is; a scalar of their type."""
    tensors = [share for t in tensors if (share := local(t)).numel()]
    if not tensors:
        return torch.zeros(())
    # One copy of all small ones: a reduction for each of hundreds of factors takes four times as long.
    small = [t.reshape(-1) for t in tensors if t.numel() < SMALL]
    pieces = [t for t in tensors if t.numel() >= SMALL] + ([torch.cat(small)] if small else [])
    extremes = [x for piece in pieces for x in torch.aminmax(piece)]  # passes NaN on
    return torch.stack([x.to(extremes[0]) for x in extremes]).abs().max()


def _judge(losses: list[float], gradient: float) -> str | None:
    if bad := [loss for loss in losses if not math.isfinite(loss)]:
        return f"the loss is {bad[0]}"
    return None if math.isfinite(gradient) else f"a gradient is {gradient}"


def _listed(ids: list[str]) -> str:
    more = f" and {len(ids) - LISTED} more" if len(ids) > LISTED else ""
    return ", ".join(ids[:LISTED]) + more
