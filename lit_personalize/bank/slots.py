"""One place of a bank: the adapter that trains there, its counters, and its learning rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lit_personalize.bank.job import AdapterJob, StepBatches
from lit_personalize.errors import DataError, UsageError
from lit_personalize.objectives.objective import Objective


class Rates:
    """Learning rates and weight decays of one adapter's parameter groups, by the recipe's optimizer and schedule.

    The optimizer is the recipe's own, over empty parameters: it holds the rates, and its schedule moves them. What it
    does with gradients is `bank.optimizer`'s.

    Args:
        objective: Has the optimizer and the schedule.
        groups: Options of the parameter groups; their own rates go before the next two.
        lr: Instead of the optimizer's; likewise `weight_decay`.

    Raises:
        UsageError: The recipe's optimizer is not AdamW, or one of AdamW's variants.
    """

    def __init__(
        self,
        objective: Objective,
        groups: Sequence[Mapping[str, Any]],
        lr: float | None = None,
        weight_decay: float | None = None,
    ):
        own = {k: v for k, v in (("lr", lr), ("weight_decay", weight_decay)) if v is not None}
        empty = [{**own, **group, "params": [nn.Parameter(torch.zeros(0))]} for group in groups]
        self.optimizer = objective.build_optimizer(empty)
        kind, defaults = type(self.optimizer), self.optimizer.defaults
        if kind is not torch.optim.AdamW or defaults["amsgrad"] or defaults["maximize"]:
            raise UsageError(
                f"a bank trains with torch.optim.AdamW without amsgrad and maximize, not {kind.__name__}: set "
                "model.init_args.optimizer to it, or use litp fit"
            )
        factory = objective.scheduler_factory
        self.schedule = None if factory is None else factory(self.optimizer)

    @property
    def now(self) -> list[tuple[float, float]]:
        """Learning rate and weight decay of each group at the coming step."""
        return [(float(group["lr"]), float(group["weight_decay"])) for group in self.optimizer.param_groups]

    def advance(self) -> None:
        """Go on to the next step."""
        if self.schedule is not None:
            self.optimizer.step()
            self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        return {"groups": groups, "schedule": self.schedule.state_dict() if self.schedule is not None else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for group, kept in zip(self.optimizer.param_groups, state["groups"], strict=True):
            group.update(kept)
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])


@dataclass
class Slot:
    """An adapter in training."""

    job: AdapterJob
    data: StepBatches
    rates: Rates
    step: int = 0
    """Steps begun and ended, skipped ones too; keys every random draw."""
    skipped: int = 0
    skipped_in_row: int = 0
    losses: list[float] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return self.step >= self.job.steps

    def advance(self, loss: float, skipped: bool) -> None:
        """Note a step."""
        self.losses.append(loss)
        self.step += 1
        self.skipped += skipped
        self.skipped_in_row = self.skipped_in_row + 1 if skipped else 0
        self.rates.advance()

    def failure(self, patience: int) -> str:
        """Why the adapter cannot go on; "" if it can."""
        if self.skipped_in_row < patience:
            return ""
        kind = "the loss" if not math.isfinite(self.losses[-1]) else "the gradient"
        return (
            f"{kind} was not finite in {self.skipped_in_row} steps in a row, up to step {self.step - 1}: lower the "
            "learning rate, and look at the pictures"
        )

    def state_dict(self) -> dict[str, Any]:
        names = ("step", "skipped", "skipped_in_row")
        own = {name: getattr(self, name) for name in names}
        return {
            "id": self.job.id, "options": self.job.options(), **own, "losses": list(self.losses),
            "rates": self.rates.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the counters.

        Raises:
            DataError: The job is another one than when the state was taken.
        """
        if state["options"] != (options := self.job.options()):
            changed = [name for name, value in options.items() if state["options"].get(name) != value]
            raise DataError(f"adapter {self.job.id} was begun with other {', '.join(changed)}: use another folder")
        self.step, self.skipped, self.skipped_in_row = state["step"], state["skipped"], state["skipped_in_row"]
        self.losses = list(state["losses"])
        self.rates.load_state_dict(state["rates"])
