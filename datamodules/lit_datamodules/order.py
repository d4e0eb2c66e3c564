"""Which samples make batch k: pure functions of (seed, k), the same for any number of workers or ranks.

Instances and regularization pictures are two endless streams. A stream walks through epochs, each in
an order of its own; batch k takes the next places of both. Nothing is drawn from a global generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

INSTANCE, PRIOR = 0, 1  # values of the trainer's `Role`
Mixing = Literal["interleaved", "joint"]


def counter_rng(*parts: int | str) -> np.random.Generator:
    """A Philox generator keyed by the parts."""
    digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


@lru_cache(maxsize=64)
def epoch_order(seed: int, purpose: str, epoch: int, count: int) -> np.ndarray:
    """A permutation of `count` places for one epoch."""
    return counter_rng(seed, purpose, epoch).permutation(count)


def place_in_epoch(seed: int, purpose: str, visit: int, count: int) -> int:
    """Which of `count` places the stream shows at its `visit`-th draw."""
    return int(epoch_order(seed, purpose, visit // count, count)[visit % count])


def stream(seed: int, purpose: str, pools: Sequence[Sequence[int]], mixing: Mixing, visit: int) -> int:
    """The sample at place `visit` of an endless stream over several pools (concepts, or sets).

    Args:
        mixing: "interleaved" takes the pools in turn, so that each has the same share of every batch;
            "joint" shuffles their union, so that larger pools have larger shares.
    """
    if mixing == "joint":
        place = place_in_epoch(seed, purpose, visit, sum(map(len, pools)))
        for pool in pools:
            if place < len(pool):
                return pool[place]
            place -= len(pool)
    turn, visit_of_pool = visit % len(pools), visit // len(pools)
    pool = pools[turn]
    return pool[place_in_epoch(seed, f"{purpose}-{turn}", visit_of_pool, len(pool))]


@dataclass(frozen=True)
class Slot:
    """One place of a batch: which sample stands there, and the counters that key its random draws."""

    sample: int
    role: int
    step: int
    position: int
    """Index within the step over all ranks: instances first, then regularization."""


@dataclass(frozen=True)
class Order:
    """The order of a whole training.

    Args:
        instances: Sample numbers per concept, a number several times where its picture repeats.
        priors: Sample numbers per regularization set; as many sets as concepts are paired with them.
        batch_size: Instances per batch and rank.
        per_batch: Regularization pictures per batch and rank.
    """

    seed: int
    instances: tuple[tuple[int, ...], ...]
    priors: tuple[tuple[int, ...], ...]
    batch_size: int
    per_batch: int = 0
    mixing: Mixing = "interleaved"
    since: int = 0
    """Step at which `shown` holds: where a training went on with another number of ranks, or other batch sizes."""
    shown: tuple[int, int] = (0, 0)
    """Places of the two streams that were shown before that step."""

    def shown_at(self, step: int, world_size: int) -> tuple[int, int]:
        """Places of the streams, instances and regularization, that all steps before `step` have shown."""
        done = (step - self.since) * world_size
        return self.shown[0] + done * self.batch_size, self.shown[1] + done * self.per_batch

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> list[Slot]:
        """The share of one rank in step `step`; all ranks together have each position once."""
        slots = self._share(step, rank, world_size, INSTANCE, self.batch_size, 0)
        if self.priors:
            slots += self._share(step, rank, world_size, PRIOR, self.per_batch, self.batch_size * world_size)
        return slots

    def _share(self, step: int, rank: int, world_size: int, role: int, width: int, first: int) -> list[Slot]:
        purpose, pools = ("instance", self.instances) if role == INSTANCE else ("prior", self.priors)
        # Sets of regularization pictures take turns even where the concepts are shuffled together.
        mixing = self.mixing if role == INSTANCE else "interleaved"
        places = range(rank * width, (rank + 1) * width)
        start = self.shown_at(step, world_size)[0 if role == INSTANCE else 1]
        return [
            Slot(stream(self.seed, purpose, pools, mixing, start + place), role, step, first + place)
            for place in places
        ]
