"""What a bank is asked for, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.batch import Batch
from lit_personalize.errors import UsageError


class StepBatches(Protocol):
    """The data of one adapter: `PersonalizationData`, or `Pictures`."""

    def batch_of_step(self, step: int) -> Mapping[str, Any] | Batch:
        """The samples of a step, a function of the step alone; see `Batch` for the fields."""


@dataclass(frozen=True)
class AdapterJob:
    """One adapter to train.

    Args:
        id: Names the adapter, and its place where it is exported.
        load: Reads the data; called when the adapter gets its slot.
        steps: Optimizer steps.
        seed: Of all random draws: noise, timesteps, latents, caption dropout and random token rows. Order and views
            of the pictures are the data's.
        class_noun: Of the concept; where tokens begin with `init: CLASS`.
        lr: Learning rate; None takes the recipe's. Adapters that have one of their own keep it.
        weight_decay: Likewise.
        clip: Largest norm of the gradient; None takes the bank's.
        details: Noted in the exported files.
    """

    id: str
    load: Callable[[], StepBatches]
    steps: int
    seed: int = 0
    class_noun: str = ""
    lr: float | None = None
    weight_decay: float | None = None
    clip: float | None = None
    details: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"adapter {self.id}: steps must be at least 1, not {self.steps}")
        if self.clip is not None and not self.clip > 0:
            raise UsageError(f"adapter {self.id}: clip must be positive, or None, not {self.clip}")

    def options(self) -> dict[str, Any]:
        """What decides the adapter besides its data and the bank's recipe."""
        names = ("steps", "seed", "class_noun", "lr", "weight_decay", "clip")
        return {name: getattr(self, name) for name in names}


@dataclass
class FinishedAdapter:
    """An adapter that left its slot."""

    job: AdapterJob
    weights: AdapterWeights | None
    """None of one that failed."""
    losses: list[float] = field(default_factory=list)
    """Of every step, NaN or infinite ones too."""
    skipped: int = 0
    """Steps left out because the loss or the gradient was not finite."""
    failure: str = ""
    """Why there are no weights, in words."""
