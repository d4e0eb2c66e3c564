"""From drawn views to the mapping of a batch: ids, masks and sizes beside pixels or cached posteriors.

The mapping has the field names of the trainer's `Batch`; `B` samples, instances first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_datamodules.buckets import Shape
from lit_datamodules.concept_folder import Sample
from lit_datamodules.errors import DataError
from lit_datamodules.latent_cache import LatentCache
from lit_datamodules.order import INSTANCE, Slot
from lit_datamodules.protocols import TextEncoder
from lit_datamodules.training_view import Geometry, Shot, decide, mask_of, pixels_of, still

MOST_CAPTIONS = 4096  # whose ids are kept; personalization repeats few of them


class Drawn(NamedTuple):
    """A slot, the view that stands there, and its pixels where no posterior is kept."""

    slot: Slot
    shot: Shot
    pixels: Tensor | None
    damage: str = ""
    """Why there are no pixels."""


def draw(samples: Sequence[Sample], geometry: Geometry, kept: tuple[int, ...], slot: Slot) -> Drawn:
    """Make the view of one slot, without pixels for roles that are kept as posteriors; for worker processes."""
    sample = samples[slot.sample]
    shot = decide(sample, slot, geometry)
    try:
        return Drawn(slot, shot, None if slot.role in kept else torch.from_numpy(pixels_of(sample, shot)))
    except DataError as error:
        return Drawn(slot, shot, None, str(error))


def in_batches(samples: Sequence[Sample], geometry: Geometry, size: int) -> list[list[Sample]]:
    """Samples in batches of at most `size` whose largest views have one shape."""
    alike: dict[Shape, list[Sample]] = {}
    for sample in samples:
        alike.setdefault(geometry.shapes(sample)[-1], []).append(sample)
    return [group[start : start + size] for group in alike.values() for start in range(0, len(group), size)]


class Collator:
    """Puts the views of a step together.

    Args:
        samples: All of the training; those of a batch carry masks if any of these needs one.
        geometry: Of the views.
        text: Gives ids.
        time_ids: Whether batches carry SDXL's size conditioning.
        cache: Posteriors to deliver instead of pixels.
        instead: Gives another view for one that could not be drawn.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        geometry: Geometry,
        text: TextEncoder,
        time_ids: bool = False,
        cache: LatentCache | None = None,
        instead: Callable[[Drawn], Drawn] | None = None,
    ):
        self.samples = samples
        self.geometry = geometry
        self.text = text
        self.time_ids = time_ids
        self.cache = cache
        self.instead = instead
        self.masked = geometry.augmentation != "none" or any(s.alpha is not None for s in samples)
        self._ids: dict[str, tuple[Tensor, ...]] = {}

    def __call__(self, drawn: Sequence[Drawn]) -> dict[str, Any]:
        """Make the batch of a training step.

        Raises:
            DataError: A view could not be drawn, and nothing stands for it.
        """
        if damaged := [one.damage for one in drawn if one.damage]:
            if self.instead is None:
                raise DataError(damaged[0])
            drawn = [self.instead(one) if one.damage else one for one in drawn]
        batch = self._described([self.samples[one.slot.sample] for one in drawn], [one.shot for one in drawn])
        batch["position"] = torch.tensor([one.slot.position for one in drawn])
        kept = [one for one in drawn if self.cache is not None and one.slot.role in self.cache.roles]
        if self.cache is not None and kept:  # instances come first, and theirs are kept only where all are
            keys = [(one.slot.sample, one.shot.view.flip, one.slot.shape) for one in kept]
            batch["latent_mean"], batch["latent_std"] = self.cache.batch(keys)
        if pixels := [one.pixels for one in drawn if one.pixels is not None]:
            batch["pixels"] = torch.stack(pixels)
        return batch

    def still_batches(self, samples: Sequence[Sample], size: int) -> Iterator[dict[str, Any]]:
        """Yield the unchanging views of other samples in batches of one shape and at most `size`, for validation."""
        start = 0
        for part in in_batches(samples, self.geometry, size):
            shots = [still(sample, self.geometry) for sample in part]
            batch = self._described(part, shots)
            batch["position"] = torch.arange(start, start + len(part))
            start += len(part)
            views = [torch.from_numpy(pixels_of(s, shot)) for s, shot in zip(part, shots, strict=True)]
            batch["pixels"] = torch.stack(views)
            yield batch

    def _described(self, samples: Sequence[Sample], shots: Sequence[Shot]) -> dict[str, Any]:
        captions = [shot.caption for shot in shots]
        batch: dict[str, Any] = {
            "role": torch.tensor([s.role for s in samples]),
            "concept": torch.tensor([s.concept if s.role == INSTANCE else -1 for s in samples]),
            "sample_id": [s.name for s in samples],
            "captions": captions,
            "input_ids": self.tokenize(captions),
        }
        if self.masked:
            pairs = zip(samples, shots, strict=True)
            downscale = self.geometry.downscale
            batch["mask"] = torch.stack([torch.from_numpy(mask_of(s, shot, downscale)) for s, shot in pairs])
        if self.time_ids:
            batch["time_ids"] = torch.tensor([shot.time_ids for shot in shots], dtype=torch.float32)
        return batch

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, ...]:
        """Ids of captions, int64 `[B, S]` per tokenizer; each caption is tokenized once."""
        if len(self._ids) > MOST_CAPTIONS:
            self._ids.clear()
        if new := [caption for caption in dict.fromkeys(captions) if caption not in self._ids]:
            self._ids.update(zip(new, zip(*self.text.tokenize(new), strict=True), strict=True))
        return tuple(torch.stack(rows) for rows in zip(*(self._ids[caption] for caption in captions), strict=True))
