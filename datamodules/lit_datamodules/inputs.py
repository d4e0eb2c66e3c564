"""What a configuration reads: samples of concepts and regularization sets, the fate of every file, their identity."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_datamodules import manifest, regularization
from lit_datamodules.buckets import Shape
from lit_datamodules.concept_folder import Concept, FolderContents, Sample, read_concept
from lit_datamodules.errors import DataError
from lit_datamodules.order import INSTANCE, PRIOR, Bucket, Mixing, Order
from lit_datamodules.protocols import Generator
from lit_datamodules.regularization import Regularization
from lit_datamodules.resize_augmentation import crop_box
from lit_datamodules.training_view import Geometry
from lit_datamodules.turns import fractions

log = logging.getLogger(__name__)

LARGEST_ZOOM = 1.4


class Inputs:
    """Everything that is read before training begins.

    Args:
        geometry: Of the views; the manifest notes what it crops.
        flip: Share of mirrored instance views where a concept names none.
        seed: Of the choices among files.
    """

    def __init__(self, geometry: Geometry, flip: float = 0.0, seed: int = 0):
        self.geometry = geometry
        self.flip = flip
        self.seed = seed
        self.records: list[manifest.Record] = []
        """The fate of every input file; also of a reading that fails."""
        self.samples: list[Sample] = []
        self.held_out: list[Sample] = []
        # Twice the largest view, so that shrinking first costs no visible detail.
        self._longest = round(2 * LARGEST_ZOOM * geometry.size)

    def read_concept(self, index: int, concept: Concept) -> None:
        """Read the folder of a concept."""
        self._take(read_concept(index, concept, self.flip, self._longest, self.seed))

    def read_set(self, index: int, options: Regularization, generator: Generator | None, identity: str) -> None:
        """Read a regularization set, drawn by `generator` where it is a generated one that is not there yet."""
        self._take(regularization.read_set(index, options, self._longest, generator, identity))

    def _take(self, contents: FolderContents) -> None:
        shown = {s.name: s for s in [*contents.samples, *contents.held_out]}
        for record in contents.records:
            sample = shown.get(record.path)
            self.records.append(record if sample is None else _with_crop(record, sample, self.geometry))
        self.samples += contents.samples
        self.held_out += contents.held_out

    def check(
        self, concepts: Sequence[Concept], sets: Sequence[Regularization], strict: bool, max_skipped: int
    ) -> None:
        """Refuse what cannot be trained on.

        Raises:
            DataError: More unusable inputs than are allowed, or a concept or set of which nothing is left.
        """
        manifest.check_skipped(self.records, strict, max_skipped)
        for index, concept in enumerate(concepts):
            if not any(s.role == INSTANCE and s.concept == index for s in self.samples):
                raise DataError(f"no picture of {concept.path} can be used; see the reasons in the manifest")
        for index, options in enumerate(sets):
            if not any(s.role == PRIOR and s.concept == index for s in self.samples):
                raise DataError(f"no picture of the regularization set {options.shards or options.folder} can be used")


def buckets_of(samples: Sequence[Sample], geometry: Geometry, repeats: Sequence[int]) -> tuple[Bucket, ...]:
    """The instances by the shapes in which they are shown, every one as often as its concept's `repeats` says."""
    found: dict[Shape, list[list[int]]] = {}
    for number, sample in enumerate(samples):
        if sample.role == INSTANCE:
            for shape in geometry.shapes(sample):
                pools = found.setdefault(shape, [[] for _ in repeats])
                pools[sample.concept] += [number] * repeats[sample.concept]
    return tuple(Bucket(shape, tuple(map(tuple, found[shape]))) for shape in sorted(found))


def sets_of(samples: Sequence[Sample], count: int) -> tuple[tuple[int, ...], ...]:
    """Numbers of the samples of each of `count` regularization sets."""
    own = [(i, s.concept) for i, s in enumerate(samples) if s.role == PRIOR]
    return tuple(tuple(i for i, concept in own if concept == number) for number in range(count))


def order_of(
    samples: Sequence[Sample], geometry: Geometry, concepts: Sequence[Concept], sets: Sequence[Regularization],
    batch_size: int, mixing: Mixing,
) -> Order:  # fmt: skip
    """Which sample stands where in every batch, from the start of a training."""
    buckets = buckets_of(samples, geometry, [concept.repeats for concept in concepts])
    shares = [concept.share for concept in concepts]
    of_sets = fractions(set_shares(sets, shares))
    return Order(
        geometry.seed, buckets, sets_of(samples, len(sets)), batch_size, per_batch(sets, batch_size), mixing,
        fractions(shares), of_sets,
    )  # fmt: skip


def per_batch(sets: Sequence[Regularization], batch_size: int) -> int:
    """Regularization pictures per batch and rank, where there are sets."""
    return sum(options.per_batch or 0 for options in sets) or batch_size


def set_shares(sets: Sequence[Regularization], shares: Sequence[float]) -> list[float]:
    """How much of the regularization pictures each set gives: as asked, or by its `per_batch`, or as its concept."""
    if all(options.per_batch for options in sets):
        default = [float(options.per_batch or 1) for options in sets]
    else:
        default = list(shares) if len(sets) == len(shares) else [1.0] * len(sets)
    return [own if options.share is None else options.share for own, options in zip(default, sets, strict=True)]


def dataset_hash(samples: Sequence[Sample]) -> str:
    """Hash of the pictures and captions that train, wherever they lie."""
    used = [(s.role, s.concept, Path(s.name).name, s.captions, s.identity, s.mask_sha256) for s in samples]
    return hashlib.sha256(json.dumps(used).encode()).hexdigest()


def files_of(samples: Sequence[Sample]) -> dict[str, str]:
    """Hash of every file that trains, by its concept or set and its name."""
    found = {f"{_place(s)}/{Path(s.name).name}": s.identity for s in samples}
    return found | {f"{_place(s)}/mask of {Path(s.name).name}": s.mask_sha256 for s in samples if s.mask_sha256}


def compare(state: Mapping[str, Any], samples: Sequence[Sample], options: Mapping[str, Any]) -> None:
    """Compare with what a checkpoint noted; options that differ are warned of.

    Raises:
        DataError: Pictures or captions changed; it names some of them.
    """
    if state["dataset"] != dataset_hash(samples):
        before, now = state["files"], files_of(samples)
        changed = sorted(n for n in before.keys() | now.keys() if before.get(n) != now.get(n))
        what = ", ".join(changed[:5]) if changed else "captions or the order of files"
        raise DataError(
            f"the training data changed since the checkpoint was written ({what}); "
            "restore it, or start a run of another name"
        )
    for name, value in state["options"].items():
        if value != options[name]:
            log.warning(
                "data.%s was %r when the checkpoint was written and is %r now: the run goes on, "
                "but is not the one that it would have been", name, value, options[name],
            )  # fmt: skip


def _place(sample: Sample) -> str:
    return f"concept {sample.concept}" if sample.role == INSTANCE else f"regularization {sample.concept}"


def _with_crop(record: manifest.Record, sample: Sample, geometry: Geometry) -> manifest.Record:
    """Note what is cut out of the upright file, in its own pixels."""
    if sample.role == PRIOR and (geometry.buckets or geometry.resolutions):  # shown in the shape of each step
        return record
    shapes = geometry.shapes(sample)
    box = None if geometry.crop == "random" else crop_box(sample.original, shapes[-1], geometry.crop)
    return replace(record, crop=box, sizes=shapes)
