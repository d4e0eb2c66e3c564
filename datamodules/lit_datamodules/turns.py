"""Pools that take turns by weight, evenly spread: which pool the n-th place of an endless stream belongs to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

LONGEST_PERIOD = 10_000
"""Places after which turns repeat; weights that need more are rounded to it."""


def fractions(shares: Sequence[float]) -> tuple[Fraction, ...]:
    """Shares as the plain fractions that were meant: 0.1 is 1/10."""
    return tuple(Fraction(share).limit_denominator(1000) or Fraction(1, 1000) for share in shares)


def whole_weights(shares: Sequence[Fraction]) -> tuple[int, ...]:
    """The smallest whole numbers in the ratio of the shares; of too fine ratios the nearest, none of them lost."""
    common = math.lcm(*(share.denominator for share in shares))
    weights = [int(share * common) for share in shares]
    if sum(weights) > LONGEST_PERIOD:
        weights = [max(1, round(LONGEST_PERIOD * share / sum(shares))) if share else 0 for share in shares]
    divisor = math.gcd(*weights)
    return tuple(weight // divisor for weight in weights)


@lru_cache(maxsize=64)
def _period(weights: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Pool of every place of a period, and how many places the pool had before it."""
    due = [((turn + 0.5) / weight, pool, turn) for pool, weight in enumerate(weights) for turn in range(weight)]
    due.sort()
    return np.array([pool for _, pool, _ in due]), np.array([turn for *_, turn in due])


def turn_at(weights: tuple[int, ...], visit: int) -> tuple[int, int]:
    """The pool whose turn place `visit` is, and how many turns it had before.

    Pool p has exactly `weights[p]` of every `sum(weights)` places; equal weights go round in order.
    """
    pools, turns = _period(weights)
    periods, place = divmod(visit, len(pools))
    pool = int(pools[place])
    return pool, periods * weights[pool] + int(turns[place])


def turns_before(weights: tuple[int, ...], visit: int) -> tuple[int, ...]:
    """How many of the first `visit` places belong to each pool."""
    pools, _ = _period(weights)
    periods, place = divmod(visit, len(pools))
    counts = np.bincount(pools[:place], minlength=len(weights))
    return tuple(periods * weight + int(count) for weight, count in zip(weights, counts, strict=True))
