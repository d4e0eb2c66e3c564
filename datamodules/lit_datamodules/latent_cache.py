"""VAE posteriors of pictures whose views do not change, encoded once: kept in memory, or in a store that runs share.

Mean and standard deviation are kept rather than a draw: every step still draws its own latent.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lit_datamodules import manifest
from lit_datamodules.buckets import Shape
from lit_datamodules.concept_folder import Sample
from lit_datamodules.errors import DataError
from lit_datamodules.order import INSTANCE, PRIOR
from lit_datamodules.protocols import ImageEncoder
from lit_datamodules.stored_picture import StoredPicture
from lit_datamodules.tensor_store import TensorStore, key_of
from lit_datamodules.training_view import Geometry, pixels_of, still

log = logging.getLogger(__name__)

CHUNK = 4  # pictures per pass of the VAE, whose activations are large
PER_FILE = 64
"""Posteriors that are put into a store at once."""
View = tuple[int, bool, Shape]
"""A sample's number, whether it is mirrored, and height and width in pixels."""


class LatentCache:
    """Posteriors by view, of the roles whose views do not move; mirror images only of samples that are mirrored.

    Args:
        samples: All of the training.
        geometry: Of their views.
        encoder: Encodes what is not there yet.
        store: Keeps posteriors on disk, under keys that hold the picture's bytes, all that decides its view, and the
            weights and precision of the VAE. Without it, everything is encoded into memory.
        task: With a store: encode the `task[0]`-th of `task[1]` shares of what is missing.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        geometry: Geometry,
        encoder: ImageEncoder,
        store: TensorStore | None = None,
        task: tuple[int, int] = (0, 1),
    ):
        self.samples = samples
        self.geometry = geometry
        self.store = store
        self.damaged: dict[int, str] = {}
        """Samples whose streamed picture cannot be read, with the reason."""
        self.roles = tuple(role for role in (INSTANCE, PRIOR) if not geometry.moves(role))
        """Of which samples every posterior is kept."""
        instances = [s for s in samples if s.role == INSTANCE]
        all_shapes = list(dict.fromkeys(shape for s in instances for shape in geometry.shapes(s)))
        views = [
            (i, flip, shape)
            for i, s in enumerate(samples)
            if s.role in self.roles
            for flip in ((False, True) if s.flip else (False,))
            for shape in (geometry.shapes(s) if s.role == INSTANCE else all_shapes)
        ]
        self._kept: dict[View, tuple[Tensor, Tensor]] = {}
        self._keys: dict[View, str] = {}
        if store is not None:
            self._keys = {view: self._key(view, encoder.vae_identity) for view in views}
        missing = [view for view in views if store is None or self._keys[view] not in store]
        self.encoded = missing[task[0] :: task[1]]
        """Views that were not known, and that this process encoded."""
        self.hits, self.misses = len(views) - len(missing), len(missing)
        self._fill(self.encoded, encoder)
        if store is not None:  # streamed pictures are more than memory holds, and so may their latents be
            held = [view for view in views if not isinstance(samples[view[0]].picture, StoredPicture)]
            self._kept = {view: self._read(view) for view in held if self._keys[view] in store}

    def _key(self, view: View, vae: str) -> str:
        sample = self.samples[view[0]]
        shot = still(sample, self.geometry, *view[1:])
        return key_of("posterior 2", sample.identity, sample.size, shot.box, view[2], view[1], vae)

    def _fill(self, views: Sequence[View], encoder: ImageEncoder) -> None:
        made: dict[View, tuple[Tensor, Tensor]] = {}
        for start in range(0, len(views), CHUNK):
            pictures = [(view, self._pixels(view)) for view in views[start : start + CHUNK]]
            drawn = [(view, pixels) for view, pixels in pictures if pixels is not None]
            for shape in dict.fromkeys(view[2] for view, _ in drawn):
                alike = [(view, pixels) for view, pixels in drawn if view[2] == shape]
                mean, std = encoder.encode_pixels(torch.from_numpy(np.stack([pixels for _, pixels in alike])))
                for (view, _), m, s in zip(alike, mean.float().cpu(), std.float().cpu(), strict=True):
                    made[view] = (m.clone(), s.clone())
            if self.store is not None and (len(made) >= PER_FILE or start + CHUNK >= len(views)):
                self.store.put({self._keys[view]: {"mean": m, "std": s} for view, (m, s) in made.items()})
                made = {}
        self._kept.update(made)

    def _pixels(self, view: View) -> np.ndarray | None:
        sample = self.samples[view[0]]
        try:
            return pixels_of(sample, still(sample, self.geometry, *view[1:]))
        except DataError as error:
            self.damaged[view[0]] = str(error)
            return None

    def _read(self, view: View) -> tuple[Tensor, Tensor]:
        entry = self.store.get(self._keys[view]) if self.store is not None else {}
        return entry["mean"], entry["std"]

    def __len__(self) -> int:
        return self.hits + self.misses

    def batch(self, keys: Sequence[View]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, fp32 `[len(keys), C, h, w]`."""
        found = [self._kept[key] if key in self._kept else self._read(key) for key in keys]
        means, deviations = zip(*found, strict=True)
        return torch.stack(means), torch.stack(deviations)


def kept_latents(
    samples: Sequence[Sample],
    geometry: Geometry,
    images: ImageEncoder,
    store: TensorStore | None,
    task: tuple[int, int],
    records: list[manifest.Record],
    strict: bool,
    max_skipped: int,
) -> LatentCache:
    """A cache of the samples without those whose streamed picture turned out to be damaged, which `records` then tell.

    Raises:
        DataError: Damage is not allowed, or there is too much of it.
    """
    cache = LatentCache(samples, geometry, images, store, task)
    if cache.damaged:
        for number, reason in cache.damaged.items():
            manifest.skip(records, samples[number].name, reason)
        manifest.check_skipped(records, strict, max_skipped)
        whole = [sample for number, sample in enumerate(samples) if number not in cache.damaged]
        cache = LatentCache(whole, geometry, images, store, task)
    known = f", {cache.hits} of them were known" if store else ""
    log.info("cached the latents of %d views%s", len(cache), known)
    return cache
