"""Which sample stands where: pure functions of (seed, step), the same for any number of workers."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np


def counter_rng(*parts: int | str) -> np.random.Generator:
    """A Philox generator keyed by the parts; nothing is drawn from a global one."""
    digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


@lru_cache(maxsize=64)
def epoch_order(seed: int, purpose: str, epoch: int, count: int) -> tuple[int, ...]:
    """A permutation of `count` samples for one epoch."""
    return tuple(int(i) for i in counter_rng(seed, purpose, epoch).permutation(count))


def samples_of_step(seed: int, purpose: str, step: int, per_step: int, count: int) -> list[int]:
    """The `per_step` samples of a step: epochs are walked through without gap, each in its own order."""
    places = range(step * per_step, (step + 1) * per_step)
    return [epoch_order(seed, purpose, p // count, count)[p % count] for p in places]


def share_of_rank(per_step: int, rank: int, world: int) -> range:
    """Positions of a step that belong to one rank; all ranks together cover each once."""
    if per_step % world:
        raise ValueError(f"a step of {per_step} samples does not divide among {world} ranks")
    width = per_step // world
    return range(rank * width, (rank + 1) * width)
