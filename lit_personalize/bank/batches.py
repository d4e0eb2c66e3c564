"""The steps of all slots as one batch: slots side by side, every sample with the keys of its own adapter's draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_personalize.backbones.base import Base
from lit_personalize.bank.job import AdapterJob
from lit_personalize.batch import Batch
from lit_personalize.errors import DataError

CHUNK = 8  # pictures per pass of the VAE, whose activations are large


def shape_of(batch: Batch) -> tuple[int, ...]:
    """What must be the same in all slots: samples, and channels, height and width of what they hold."""
    parts = (part for part in (batch.pixels, batch.latent_mean) if part is not None)
    return len(batch), *(side for part in parts for side in part.shape[1:])


def check(job: AdapterJob, batch: Batch, wanted: tuple[int, ...]) -> None:
    """Refuse a step that cannot stand beside the others.

    Raises:
        DataError: It has another shape.
    """
    if (found := shape_of(batch)) != wanted:
        raise DataError(
            f"adapter {job.id}: a step has {found[0]} samples of {list(found[1:])}, the bank's slots have {wanted[0]} "
            f"of {list(wanted[1:])}; give all adapters the same resolution, batch size and regularization"
        )


def join(jobs: Sequence[AdapterJob], steps: Sequence[int], batches: Sequence[Batch], base: Base) -> Batch:
    """One batch of G·b samples, on the base's device; pixels are encoded here.

    Args:
        jobs: Of each slot.
        steps: At which each slot is.
        batches: Of each slot, alike in shape.
    """
    parts = [batch.to(base.device) for batch in batches]
    means, deviations = _posteriors(parts, base)
    size = len(parts[0])

    def each(values: Sequence[int]) -> Tensor:
        return torch.tensor(values).repeat_interleave(size)

    ids = None
    if parts[0].input_ids is not None:
        ids = tuple(torch.cat(rows) for rows in zip(*(part.input_ids or () for part in parts), strict=True))
    mask = None
    if any(part.mask is not None for part in parts):
        mask = torch.cat([means.new_ones(size, 1, *means.shape[2:]) if p.mask is None else p.mask for p in parts])
    return Batch(
        role=torch.cat([part.role for part in parts]),
        position=torch.cat([part.position for part in parts]),
        sample_id=[name for part in parts for name in part.sample_id],
        latent_mean=means, latent_std=deviations, input_ids=ids, mask=mask,
        text_states=_joined([part.text_states for part in parts]),
        pooled=_joined([part.pooled for part in parts]),
        time_ids=_joined([part.time_ids for part in parts]),
        slot=each(range(len(parts))).to(base.device), seed=each([job.seed for job in jobs]), step=each(steps),
    )  # fmt: skip


def _posteriors(parts: Sequence[Batch], base: Base) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of all samples; pixels come first in each slot."""
    pixels = [part.pixels for part in parts if part.pixels is not None]
    drawn: list[tuple[Tensor, ...]] = []
    if pixels:
        encoded = [base.encode_pixels(chunk) for chunk in torch.cat(pixels).split(CHUNK)]
        each = [torch.cat(values).split([len(p) for p in pixels]) for values in zip(*encoded, strict=True)]
        drawn = list(zip(*each, strict=True))
    found: list[list[Tensor]] = [[], []]
    encoded_parts = iter(drawn)
    for part in parts:
        own = [next(encoded_parts)] if part.pixels is not None else []
        if part.latent_mean is not None and part.latent_std is not None:
            own.append((part.latent_mean, part.latent_std))
        for kind, values in zip(found, zip(*own, strict=True), strict=True):
            kind += values
    return torch.cat(found[0]), torch.cat(found[1])


def _joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(there) if len(there) == len(tensors) else None
