"""Which samples make batch k: pure functions of (seed, k), the same for any number of workers or ranks.

Instances and regularization pictures are two endless streams. A stream walks through epochs, each in
an order of its own; batch k takes the next places of both. Nothing is drawn from a global generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np

from lit_datamodules.buckets import Shape
from lit_datamodules.turns import turn_at, turns_before, whole_weights

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


def stream(
    seed: int, purpose: str, pools: Sequence[Sequence[int]], mixing: Mixing, visit: int, weights: tuple[int, ...] = ()
) -> int:
    """The sample at place `visit` of an endless stream over several pools (concepts, or sets).

    Args:
        mixing: "interleaved" takes the pools in turn, by their weights; "joint" shuffles their union, so that
            larger pools have larger shares.
        weights: Shares of the pools in whole numbers; equal ones if empty.
    """
    if mixing == "joint":
        place = place_in_epoch(seed, purpose, visit, sum(map(len, pools)))
        for pool in pools:
            if place < len(pool):
                return pool[place]
            place -= len(pool)
    turn, visit_of_pool = turn_at(weights or (1,) * len(pools), visit)
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
    shape: Shape
    """Height and width of the view in pixels, one for all of a step."""


@dataclass(frozen=True)
class Bucket:
    """The instances of one shape: sample numbers per concept, a number several times where its picture repeats."""

    shape: Shape
    pools: tuple[tuple[int, ...], ...]

    @property
    def places(self) -> int:
        """Of one pass."""
        return sum(map(len, self.pools))


@dataclass(frozen=True)
class Order:
    """The order of a whole training.

    Every step has one shape. Instances are those of its bucket; regularization pictures are cut to it, so that none is
    shown more often for its shape. A bucket gets steps in proportion to its pictures and is an endless stream of its
    own: it has no tail that would be dropped or filled up.

    Args:
        buckets: At least one.
        priors: Sample numbers per regularization set; as many sets as concepts are paired with them.
        batch_size: Instances per batch and rank.
        per_batch: Regularization pictures per batch and rank.
        shares: Of the concepts, where they take turns; empty for equal ones.
        prior_shares: Of the sets; empty for equal ones.
    """

    seed: int
    buckets: tuple[Bucket, ...]
    priors: tuple[tuple[int, ...], ...]
    batch_size: int
    per_batch: int = 0
    mixing: Mixing = "interleaved"
    shares: tuple[Fraction, ...] = ()
    prior_shares: tuple[Fraction, ...] = ()
    since: int = 0
    """Step at which `shown` holds: where a training went on with another number of ranks, or other batch sizes."""
    shown: tuple[tuple[int, ...], int] = ((), 0)
    """Places of the streams, of each bucket and of regularization, that were shown before that step."""

    @cached_property
    def _weights(self) -> list[tuple[Fraction, ...]]:
        """Weight of each concept in each bucket: its share of the places, spread over its pictures."""
        concepts = range(len(self.buckets[0].pools))
        sizes = [sum(len(bucket.pools[c]) for bucket in self.buckets) for c in concepts]
        if self.mixing == "joint":
            shares = tuple(map(Fraction, sizes))
        else:
            shares = self.shares or (Fraction(1),) * len(sizes)
        return [tuple(shares[c] * Fraction(len(b.pools[c]), sizes[c]) for c in concepts) for b in self.buckets]

    @cached_property
    def _turns(self) -> tuple[int, ...]:
        """Turns of the buckets in whole numbers."""
        return whole_weights([sum(weights, Fraction(0)) for weights in self._weights])

    @cached_property
    def _concept_turns(self) -> list[tuple[int, ...]]:
        return [whole_weights(weights) for weights in self._weights]

    @cached_property
    def _prior_turns(self) -> tuple[int, ...]:
        return whole_weights(self.prior_shares) if self.prior_shares else ()

    def shown_at(self, step: int, world_size: int) -> tuple[tuple[int, ...], int]:
        """Places of the streams, of each bucket and of regularization, that all steps before `step` have shown."""
        before = self.shown[0] or (0,) * len(self.buckets)
        steps = [b - a for a, b in zip(*(turns_before(self._turns, s) for s in (self.since, step)), strict=True)]
        width = world_size * self.batch_size
        instances = tuple(n + turns * width for n, turns in zip(before, steps, strict=True))
        return instances, self.shown[1] + (step - self.since) * world_size * self.per_batch

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> list[Slot]:
        """The share of one rank in step `step`; all ranks together have each position once."""
        number, _ = turn_at(self._turns, step)
        bucket = self.buckets[number]
        purpose = "instance" if len(self.buckets) == 1 else "instance {}x{}".format(*bucket.shape)
        instances, priors = self.shown_at(step, world_size)

        def share(role: int, width: int, first: int, sample: Callable[[int], int]) -> list[Slot]:
            places = range(rank * width, (rank + 1) * width)
            return [Slot(sample(place), role, step, first + place, bucket.shape) for place in places]

        def instance(place: int) -> int:
            weights = self._concept_turns[number]
            return stream(self.seed, purpose, bucket.pools, self.mixing, instances[number] + place, weights)

        def prior(place: int) -> int:
            # Sets of regularization pictures take turns even where the concepts are shuffled together.
            return stream(self.seed, "prior", self.priors, "interleaved", priors + place, self._prior_turns)

        slots = share(INSTANCE, self.batch_size, 0, instance)
        if self.priors:
            slots += share(PRIOR, self.per_batch, self.batch_size * world_size, prior)
        return slots
