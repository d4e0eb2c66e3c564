"""Counter-based random draws: every number is a function of (seed, purpose, step, sample).

Nothing here touches a global generator. A draw does not depend on what was drawn before it, on the
batch it is part of, on the rank or on the device: so a resumed run repeats an undisturbed one, and
an adapter trained in a bank sees the noise that it would have seen alone. Bits come from Philox-4x64
(Salmon et al., 2011) with a key hashed from the four parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

Counter = int | Sequence[int]
"""Of all samples, or of each: adapters of a bank have seeds and steps of their own."""


def generator(seed: int, purpose: str, step: int = 0, sample: int | str = 0) -> np.random.Generator:
    """A generator for one purpose at one step for one sample."""
    text = f"{seed}|{purpose}|{step}|{sample}".encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))


def _generators(
    seed: Counter, purpose: str, step: Counter, samples: Sequence[int | str]
) -> Iterator[np.random.Generator]:
    """One for every sample."""
    seeds, steps = ([x] * len(samples) if isinstance(x, int) else x for x in (seed, step))
    return (generator(a, purpose, b, c) for a, b, c in zip(seeds, steps, samples, strict=True))


def normal(shape: Sequence[int], seed: Counter, purpose: str, step: Counter, samples: Sequence[int | str]) -> Tensor:
    """Standard normal draws, one per sample: fp32 `[len(samples), *shape]` on the CPU."""
    sources = _generators(seed, purpose, step, samples)
    return torch.from_numpy(np.stack([s.standard_normal(tuple(shape), dtype=np.float32) for s in sources]))


def integers(low: int, high: int, seed: Counter, purpose: str, step: Counter, samples: Sequence[int | str]) -> Tensor:
    """Uniform integers in [low, high), one per sample: int64 `[len(samples)]` on the CPU."""
    return torch.tensor([int(s.integers(low, high)) for s in _generators(seed, purpose, step, samples)])


def uniform(seed: Counter, purpose: str, step: Counter, samples: Sequence[int | str]) -> Tensor:
    """Uniform numbers in [0, 1), one per sample: fp32 `[len(samples)]` on the CPU."""
    return torch.tensor([float(s.random()) for s in _generators(seed, purpose, step, samples)])
