"""The data module of personalization: a few pictures per concept, and regularization sets beside them.

Batch k is a function of (seed, k): instances first, then regularization pictures, each stream walking
through its own epochs. The mapping it delivers has the field names of the trainer's `Batch`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lit_datamodules import manifest, regularization, sheet, sheet_sections
from lit_datamodules.concept_folder import Concept, FolderContents, Sample, read_concept
from lit_datamodules.errors import DataError, DataOptionError
from lit_datamodules.latent_cache import LatentCache
from lit_datamodules.order import INSTANCE, PRIOR, Mixing, Order, Slot
from lit_datamodules.protocols import Generator, ImageEncoder, TextEncoder
from lit_datamodules.regularization import Regularization
from lit_datamodules.resize_augmentation import CropMode, crop_box
from lit_datamodules.step_loader import FixedLoader, StepLoader
from lit_datamodules.training_view import Augmentation, Geometry, Shot, decide, mask_of, pixels_of, still

log = logging.getLogger(__name__)

LARGEST_ZOOM = 1.4
DEFAULT_DOWNSCALE = 8  # until the base is known
Drawn = tuple[Slot, Shot, Tensor | None]


class PersonalizationData(pl.LightningDataModule):
    """Concept folders and regularization sets as batches.

    Args:
        concepts: Learned together; each has its own folder and token.
        resolution: Side of the training views in pixels; None takes the base's.
        regularization: One set or several that take turns; paired with the concepts where they are as many.
        batch_size: Instances per batch and rank. Regularization adds as many again, or its `per_batch`.
        augmentation: "custom_diffusion" resizes instances at random, with masks and prompt prefixes;
            "custom_diffusion_port" does it as the port in diffusers.
        crop: Of pictures that are not square: "center", "random", or "squash" to a square.
        flip: Share of mirrored instance views, true for half of them.
        mixing: Of several concepts: "interleaved" in turns, "joint" by their number of pictures.
        cache_latents: Encode every picture once; "auto" does it where views do not change.
        num_workers: Processes that draw views; unused where latents are cached.
        strict: An unusable input is an error; otherwise up to `max_skipped` are skipped and recorded.
        max_skipped: Budget of a run that is not strict.
        seed: Of order and views.
    """

    def __init__(
        self,
        concepts: list[Concept],
        resolution: int | None = None,
        regularization: Regularization | list[Regularization] | None = None,
        batch_size: int = 1,
        augmentation: Augmentation = "none",
        crop: CropMode = "center",
        flip: bool | float = False,
        mixing: Mixing = "interleaved",
        cache_latents: bool | Literal["auto"] = "auto",
        num_workers: int = 0,
        strict: bool = True,
        max_skipped: int = 10,
        seed: int = 0,
    ):
        super().__init__()
        if not concepts:
            raise DataOptionError("data.concepts is empty: name at least one folder of pictures")
        if batch_size < 1:
            raise DataOptionError(f"data.batch_size must be at least 1, not {batch_size}")
        self.flip = 0.5 if flip is True else float(flip)
        if not 0 <= self.flip <= 1:
            raise DataOptionError(f"data.flip is a share in [0, 1], not {flip}")
        self.concepts = concepts
        self.resolution = resolution or 512
        self._wants_native_resolution = resolution is None
        self.regularization = [regularization] if isinstance(regularization, Regularization) else regularization or []
        self.batch_size = batch_size
        self.augmentation: Augmentation = augmentation
        self.crop: CropMode = crop
        self.mixing: Mixing = mixing
        self.cache_latents = cache_latents
        self.num_workers = num_workers
        self.strict = strict
        self.max_skipped = max_skipped
        self.seed = seed
        self.records: list[manifest.Record] = []
        """The fate of every input file; filled by `setup`, also if it fails."""
        self.samples: list[Sample] = []
        self.held_out: list[Sample] = []
        self.cache: LatentCache | None = None
        self._text: TextEncoder | None = None
        self._images: ImageEncoder | None = None
        self._generator: Generator | None = None
        self._identity = ""
        self._downscale = DEFAULT_DOWNSCALE
        self._ids: dict[str, tuple[Tensor, ...]] = {}
        self._expected: dict[str, Any] | None = None
        self._loader: StepLoader[Slot] | None = None
        self._cursor: dict[str, int] | None = None
        self._refuse_moving_cache()
        if not any(concept.held_out for concept in concepts):
            # Lightning validates where the hook is overridden; without held-out pictures it is not.
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]

    def bind(
        self,
        text_encoder: TextEncoder,
        image_encoder: ImageEncoder,
        generator: Generator | None = None,
        identity: str = "",
    ) -> None:
        """Give the module a base's encoders, before `setup`.

        `identity` names all that decides what `generator` draws besides caption, seed and resolution: the base, its
        precision, scheduler, steps and guidance. Generated sets are kept under it.
        """
        self._text, self._images, self._generator = text_encoder, image_encoder, generator
        self.suit(image_encoder.resolution, image_encoder.downscale)
        self._identity = f"{identity} {self.resolution} px"

    def suit(self, resolution: int, downscale: int) -> None:
        """Take the native side and the pixels per latent cell of a base; enough to check and show data.

        Raises:
            DataOptionError: The configured resolution lies between two latent cells.
        """
        self._downscale = downscale
        if self._wants_native_resolution:
            self.resolution = resolution
        if self.resolution % downscale:
            raise DataOptionError(
                f"data.resolution {self.resolution} is no multiple of {downscale}, "
                "the pixels per latent cell of this base"
            )

    # ---- reading ----------------------------------------------------------------------------------

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.resolution, self._downscale, self.augmentation, self.crop, self.seed)

    def _refuse_moving_cache(self) -> None:
        if self.cache_latents is True and not self.geometry.still:
            why = "augmentation resizes" if self.augmentation != "none" else "random crops move"
            raise DataOptionError(
                f"data.cache_latents is true, but {why} the pictures at every step; set it to auto, or turn that off"
            )

    def prepare_data(self) -> None:
        """Draw generated regularization sets that are not there yet; one process does it for all."""
        for options in self.regularization:
            if options.generate:
                regularization.generated_folder(options, self._generator, self._identity)

    def setup(self, stage: str | None = None) -> None:
        """Read all pictures and captions once; a second call does nothing.

        Raises:
            DataError: Missing, empty or unusable inputs, or other ones than those of the checkpoint.
            DataOptionError: Options that cannot work together.
        """
        if self.samples:
            return
        self.records = []
        # Twice the largest view, so that shrinking first costs no visible detail.
        longest = round(2 * LARGEST_ZOOM * self.resolution)
        samples: list[Sample] = []
        held_out: list[Sample] = []
        for index, concept in enumerate(self.concepts):
            contents = read_concept(index, concept, self.flip, longest, self.seed)
            self._take(contents, samples, held_out)
        for index, options in enumerate(self.regularization):
            read = regularization.read_set(index, options, longest, self._generator, self._identity)
            self._take(read, samples, held_out)
        manifest.check_skipped(self.records, self.strict, self.max_skipped)
        self._refuse_empty(samples)
        self.samples, self.held_out = samples, held_out
        if self._expected is not None:
            self.load_state_dict(self._expected)
        if self.cache_latents is True and self._images is None:
            raise DataOptionError("data.cache_latents is true, but no image encoder is bound; call bind before setup")
        if self.cache_latents is not False and self.geometry.still and self._images is not None:
            self.cache = LatentCache(samples, self.geometry, self._images)
            log.info("cached the latents of %d views", len(self.cache))

    def _take(self, contents: FolderContents, samples: list[Sample], held_out: list[Sample]) -> None:
        geometry = self.geometry
        shown = {s.name: s for s in [*contents.samples, *contents.held_out]}
        for record in contents.records:
            sample = shown.get(record.path)
            self.records.append(record if sample is None else _with_crop(record, sample, geometry))
        samples += contents.samples
        held_out += contents.held_out

    def _refuse_empty(self, samples: Sequence[Sample]) -> None:
        for index, concept in enumerate(self.concepts):
            if not any(s.role == INSTANCE and s.concept == index for s in samples):
                raise DataError(f"no picture of {concept.path} can be used; see the reasons in the manifest")
        for index, options in enumerate(self.regularization):
            if not any(s.role == PRIOR and s.concept == index for s in samples):
                raise DataError(f"no picture of the regularization set {options.shards or options.folder} can be used")

    # ---- batches ----------------------------------------------------------------------------------

    @property
    def order(self) -> Order:
        """Which sample stands where in every batch."""
        instances, priors = self._pools(INSTANCE, len(self.concepts)), self._pools(PRIOR, len(self.regularization))
        asked = [options.per_batch for options in self.regularization if options.per_batch is not None]
        return Order(self.seed, instances, priors, self.batch_size, sum(asked) or self.batch_size, self.mixing)

    def _pools(self, role: int, count: int) -> tuple[tuple[int, ...], ...]:
        def times(sample: Sample) -> int:
            return self.concepts[sample.concept].repeats if role == INSTANCE else 1

        return tuple(
            tuple(i for i, s in enumerate(self.samples) if (s.role, s.concept) == (role, pool) for _ in range(times(s)))
            for pool in range(count)
        )

    @property
    def steps(self) -> int:
        """Batches of an epoch: the whole training if the trainer counts steps, else one pass over the instances."""
        if self.trainer is not None and self.trainer.max_steps > 0:
            return self.trainer.max_steps * self.trainer.accumulate_grad_batches
        ranks = self.trainer.world_size if self.trainer is not None else 1
        return -(-sum(len(pool) for pool in self.order.instances) // (self.batch_size * ranks))

    def train_dataloader(self) -> StepLoader[Slot]:
        """Loader of this rank, resumable at every step."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        slots = functools.partial(_slots, self.order, rank, world_size)
        workers = 0 if self.cache else self.num_workers
        self._loader = StepLoader(slots, self._draw_function(), self.collate, self.steps, workers)
        if self._cursor is not None:
            self._loader.load_state_dict(self._cursor)
        return self._loader

    def teardown(self, stage: str | None = None) -> None:
        """End the worker processes."""
        if self._loader is not None:
            self._loader.close()

    def _draw_function(self) -> functools.partial[Drawn]:
        # Workers get the pictures and the geometry, but not the base.
        return functools.partial(_draw, self.samples, self.geometry, self.cache is None)

    def batch_of_step(self, step: int) -> dict[str, Any]:
        """The mapping of one step, by itself; see the trainer's `Batch` for its fields."""
        draw = self._draw_function()
        return self.collate([draw(slot) for slot in self.order.batch(step)])

    def collate(self, drawn: Sequence[Drawn]) -> dict[str, Any]:
        """Put drawn views together with ids, masks and sizes.

        Raises:
            DataOptionError: No encoders are bound.
        """
        if self._text is None or self._images is None:
            raise DataOptionError("no base is bound to the data module; call bind before batches are drawn")
        samples = [self.samples[slot.sample] for slot, _, _ in drawn]
        batch = self._described(samples, [shot for _, shot, _ in drawn])
        batch["position"] = torch.tensor([slot.position for slot, _, _ in drawn])
        if self.cache is not None:
            keys = [(slot.sample, shot.view.flip) for slot, shot, _ in drawn]
            batch["latent_mean"], batch["latent_std"] = self.cache.batch(keys)
        else:
            batch["pixels"] = torch.stack([pixels for _, _, pixels in drawn if pixels is not None])
        return batch

    def _described(self, samples: Sequence[Sample], shots: Sequence[Shot]) -> dict[str, Any]:
        captions = [shot.caption for shot in shots]
        batch: dict[str, Any] = {
            "role": torch.tensor([s.role for s in samples]),
            "concept": torch.tensor([s.concept if s.role == INSTANCE else -1 for s in samples]),
            "sample_id": [s.name for s in samples],
            "captions": captions,
            "input_ids": self._tokenize(captions),
        }
        geometry = self.geometry
        if geometry.augmentation != "none" or any(s.alpha is not None for s in self.samples):
            pairs = zip(samples, shots, strict=True)
            batch["mask"] = torch.stack([torch.from_numpy(mask_of(s, shot, geometry.downscale)) for s, shot in pairs])
        if self._images is not None and self._images.needs_time_ids:
            batch["time_ids"] = torch.tensor([shot.time_ids for shot in shots], dtype=torch.float32)
        return batch

    def _tokenize(self, captions: Sequence[str]) -> tuple[Tensor, ...]:
        """Ids of captions; personalization repeats few of them."""
        if self._text is None:
            raise DataOptionError("no text encoder is bound to the data module; call bind before batches are drawn")
        if len(self._ids) > 4096:
            self._ids.clear()
        if new := [caption for caption in dict.fromkeys(captions) if caption not in self._ids]:
            self._ids.update(zip(new, zip(*self._text.tokenize(new), strict=True), strict=True))
        return tuple(torch.stack(rows) for rows in zip(*(self._ids[caption] for caption in captions), strict=True))

    def val_dataloader(self) -> FixedLoader:
        """Held-out pictures, the same views every time."""
        return FixedLoader(self._validation, -(-len(self.held_out) // self.batch_size))

    def _validation(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self.held_out), self.batch_size):
            samples = self.held_out[start : start + self.batch_size]
            shots = [still(sample, self.geometry) for sample in samples]
            batch = self._described(samples, shots)
            batch["position"] = torch.arange(start, start + len(samples))
            views = [torch.from_numpy(pixels_of(s, shot)) for s, shot in zip(samples, shots, strict=True)]
            batch["pixels"] = torch.stack(views)
            yield batch

    # ---- resuming ---------------------------------------------------------------------------------

    @property
    def dataset_hash(self) -> str:
        """Hash of the pictures and captions that train, wherever they lie."""
        used = [(s.role, s.concept, Path(s.name).name, s.captions, s.record and s.record.sha256) for s in self.samples]
        return hashlib.sha256(json.dumps(used).encode()).hexdigest()

    def _options(self) -> dict[str, Any]:
        return {
            "seed": self.seed, "resolution": self.resolution, "batch_size": self.batch_size, "crop": self.crop,
            "augmentation": self.augmentation, "flip": self.flip, "mixing": self.mixing,
            "concepts.repeats": [concept.repeats for concept in self.concepts],
            "concepts.flip": [concept.flip for concept in self.concepts],
            "regularization.per_batch": [options.per_batch for options in self.regularization],
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint notes of the data: its hash, its files, the options that decide batches, the cursor.

        Lightning keeps the state of loaders, too, but does not give it back in a run that was resumed at the
        end of an epoch and then again within the next.
        """
        files = {f"{_place(s)}/{Path(s.name).name}": s.record.sha256 if s.record else "" for s in self.samples}
        cursor = self._loader.state_dict() if self._loader is not None else None
        return {"dataset": self.dataset_hash, "files": files, "options": self._options(), "cursor": cursor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the cursor, and check that training goes on with the data it began with.

        Raises:
            DataError: Pictures or captions changed; it names some of them.
        """
        self._cursor = state_dict["cursor"]
        if not self.samples:
            self._expected = state_dict
            return
        if state_dict["dataset"] != self.dataset_hash:
            before, now = state_dict["files"], self.state_dict()["files"]
            changed = sorted(n for n in before.keys() | now.keys() if before.get(n) != now.get(n))
            what = ", ".join(changed[:5]) if changed else "captions or the order of files"
            raise DataError(
                f"the training data changed since the checkpoint was written ({what}); "
                "restore it, or start a run of another name"
            )
        for name, value in state_dict["options"].items():
            if value != self._options()[name]:
                log.warning(
                    "data.%s was %r when the checkpoint was written and is %r now: the run goes on, "
                    "but is not the one that it would have been", name, value, self._options()[name],
                )  # fmt: skip

    # ---- reports ----------------------------------------------------------------------------------

    def write_manifest(self, path: Path) -> None:
        """Write the fate of every input file as JSON lines."""
        manifest.write_manifest(self.records, path)

    def write_sheet(self, path: Path, most: int = 12) -> None:
        """Draw the pictures and the first training views with their captions; at most `most` of each kind."""
        parts = sheet_sections.sections(self.concepts, self.samples, self.held_out, self.order, self.geometry, most)
        sheet.write_sheet(list(parts), path)


def _slots(order: Order, rank: int, world_size: int, step: int) -> list[Slot]:
    return order.batch(step, rank, world_size)


def _draw(samples: Sequence[Sample], geometry: Geometry, with_pixels: bool, slot: Slot) -> Drawn:
    sample = samples[slot.sample]
    shot = decide(sample, slot, geometry)
    return slot, shot, torch.from_numpy(pixels_of(sample, shot)) if with_pixels else None


def _place(sample: Sample) -> str:
    return f"concept {sample.concept}" if sample.role == INSTANCE else f"regularization {sample.concept}"


def _with_crop(record: manifest.Record, sample: Sample, geometry: Geometry) -> manifest.Record:
    """Note what is cut out of the upright file, in its own pixels."""
    box = None if geometry.crop == "random" else crop_box(*sample.original, geometry.crop)
    return replace(record, crop=box, resize=geometry.size)
