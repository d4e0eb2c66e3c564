"""Pictures of one adapter in memory, as posteriors of the VAE: for adapters that are made by a program."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_personalize import randomness
from lit_personalize.backbones.base import Base
from lit_personalize.batch import Batch, Role
from lit_personalize.errors import DataError


@dataclass(frozen=True)
class Pictures:
    """Instances, and prior pictures beside them, in an order that is a function of (seed, step).

    Each stream walks through its own epochs, shuffled anew in each; a step takes the next `batch_size` of both.

    Args:
        base: Tokenizes the captions.
        mean: Posterior means `[N, C, h, w]`, unscaled.
        std: Standard deviations, likewise.
        captions: Of every picture.
        batch_size: Instances per step.
        prior: Prior pictures, as many of which stand in each step.
        seed: Of the order.
    """

    base: Base
    mean: Tensor
    std: Tensor
    captions: Sequence[str]
    batch_size: int = 1
    prior: Pictures | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == len(self.captions) > 0:
            raise DataError(f"{len(self.mean)} means, {len(self.std)} deviations, {len(self.captions)} captions: "
                            "give as many of each, and at least one")  # fmt: skip

    @classmethod
    def encode(cls, base: Base, pixels: Tensor, captions: Sequence[str], batch_size: int = 1,
               prior: Pictures | None = None, seed: int = 0) -> Pictures:  # fmt: skip
        """Encode pixels `[N, 3, H, W]` in [-1, 1]."""
        mean, std = base.encode_pixels(pixels)
        return cls(base, mean.cpu(), std.cpu(), captions, batch_size, prior, seed)

    def batch_of_step(self, step: int) -> Batch:
        """Instances, then prior pictures."""
        parts = [(self, Role.INSTANCE)] + ([(self.prior, Role.PRIOR)] if self.prior is not None else [])
        rows = [(part, i, role) for part, role in parts for i in part._shown(self.seed, role, step, self.batch_size)]
        return Batch(
            role=torch.tensor([int(role) for _, _, role in rows]),
            position=torch.arange(len(rows)),
            sample_id=[f"{role.name.lower()}-{i}" for _, i, role in rows],
            latent_mean=torch.stack([part.mean[i] for part, i, _ in rows]),
            latent_std=torch.stack([part.std[i] for part, i, _ in rows]),
            input_ids=tuple(
                torch.stack([part._ids[side][i] for part, i, _ in rows]) for side in range(len(self._ids))
            ),
        )

    @functools.cached_property
    def _ids(self) -> list[Tensor]:
        """Of every caption `[N, S]`, for each tokenizer."""
        return list(self.base.tokenize(list(self.captions)))

    def _shown(self, seed: int, role: Role, step: int, count: int) -> list[int]:
        found = []
        for visit in range(step * count, (step + 1) * count):
            epoch, place = divmod(visit, len(self.mean))
            order = randomness.generator(seed, f"order-{role.name.lower()}", epoch).permutation(len(self.mean))
            found.append(int(order[place]))
        return found
