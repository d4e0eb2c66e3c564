"""The data module of personalization: a few pictures per concept, and regularization sets beside them.

Batch k is a function of (seed, k): instances first, then regularization pictures, each stream walking
through its own epochs. The mapping it delivers has the field names of the trainer's `Batch`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from torch import distributed

from lit_datamodules import inputs, manifest, sheet, sheet_sections
from lit_datamodules.buckets import Buckets
from lit_datamodules.collating import Collator, Drawn, draw, in_batches
from lit_datamodules.concept_folder import Concept, Sample
from lit_datamodules.errors import DataOptionError
from lit_datamodules.generated_sets import draw_set
from lit_datamodules.latent_cache import LatentCache, kept_latents
from lit_datamodules.order import INSTANCE, PRIOR, Mixing, Order, Slot
from lit_datamodules.protocols import Generator, ImageEncoder, TextEncoder
from lit_datamodules.regularization import Regularization
from lit_datamodules.resize_augmentation import LARGE_PREFIXES, SMALL_PREFIXES, CropMode, prefixed
from lit_datamodules.step_loader import FixedLoader, StepLoader, WorkerStart
from lit_datamodules.substitution import Substitution
from lit_datamodules.tensor_store import TensorStore
from lit_datamodules.training_view import Augmentation, Geometry

log = logging.getLogger(__name__)

DEFAULT_DOWNSCALE = 8  # until the base is known


class PersonalizationData(pl.LightningDataModule):
    """Concept folders and regularization sets as batches.

    Args:
        concepts: Learned together; each has its own folder and token.
        resolution: Side of the training views in pixels, or several of them, each of which shows the pictures that
            are large enough for it; None takes the base's.
        regularization: One set or several that take turns; paired with the concepts where they are as many.
        batch_size: Instances per batch and rank. Regularization adds as many again, or its `per_batch`.
        augmentation: "custom_diffusion" resizes instances at random, with masks and prompt prefixes;
            "custom_diffusion_port" does it as the port in diffusers.
        crop: Of pictures that have not the view's shape: "center", "random", or "squash" into it.
        buckets: Views near the pictures' own aspect ratios, of as many pixels as the resolution's square; None shows
            squares. Each step has one shape, to which regularization pictures are cut.
        flip: Share of mirrored instance views, true for half of them.
        mixing: Of several concepts: "interleaved" in turns, "joint" by their number of pictures.
        cache_latents: Encode every picture once; "auto" does it for pictures whose views do not change, such as those
            for regularization. Latents are kept in memory, or, of streamed sets, in `cache_dir`, without which
            they are not kept.
        cache_dir: Folder in which latents and text states are kept for all runs; see `litp data cache`.
        num_workers: Processes that draw views; unused where latents are cached.
        worker_start: How they are started: "fork", "spawn" or "forkserver"; None takes Python's default.
        elastic: Go on from a checkpoint with another number of ranks; otherwise that is refused.
        strict: An unusable input is an error; otherwise up to `max_skipped` are skipped and recorded.
        max_skipped: Budget of a run that is not strict; each rank counts the damage that it is shown.
        seed: Of order and views.
    """

    def __init__(
        self,
        concepts: list[Concept],
        resolution: int | list[int] | None = None,
        regularization: Regularization | list[Regularization] | None = None,
        batch_size: int = 1,
        augmentation: Augmentation = "none",
        crop: CropMode = "center",
        buckets: Buckets | None = None,
        flip: bool | float = False,
        mixing: Mixing = "interleaved",
        cache_latents: bool | Literal["auto"] = "auto",
        cache_dir: str | None = None,
        num_workers: int = 0,
        worker_start: WorkerStart | None = None,
        elastic: bool = False,
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
        if mixing == "joint" and any(concept.share != 1 for concept in concepts):
            raise DataOptionError("data.mixing joint counts pictures and takes no concept's share; weigh with repeats")
        self.concepts = concepts
        sides = sorted({resolution} if isinstance(resolution, int) else set(resolution or [512]))
        if sides[0] < 1:
            raise DataOptionError(f"data.resolution must be a side in pixels, not {sides[0]}")
        self.resolution, self.smaller = sides[-1], tuple(sides[:-1])
        self.buckets = buckets
        self._wants_native_resolution = resolution is None
        self.regularization = [regularization] if isinstance(regularization, Regularization) else regularization or []
        self.batch_size = batch_size
        self.augmentation: Augmentation = augmentation
        self.crop: CropMode = crop
        self.mixing: Mixing = mixing
        self.cache_latents = cache_latents
        self.cache_dir = Path(cache_dir) if cache_dir else None
        self.task = (0, 1)
        """The share of what a cache lacks that this process fills; `litp data cache` sets it."""
        self.num_workers = num_workers
        self.worker_start: WorkerStart | None = worker_start
        self.elastic = elastic
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
        self._collator: Collator | None = None
        self._expected: dict[str, Any] | None = None
        self._loader: StepLoader[Slot] | None = None
        self._cursor: dict[str, Any] | None = None
        self._world_size = 1
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
        self._collator = None
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
        for side in (*self.smaller, self.resolution):
            if self.buckets is not None:
                self.buckets.check(side, downscale)
            elif side % downscale:
                raise DataOptionError(
                    f"data.resolution {side} is no multiple of {downscale}, the pixels per latent cell of this base"
                )

    # ---- reading ----------------------------------------------------------------------------------

    @property
    def geometry(self) -> Geometry:
        return Geometry(
            self.resolution, self._downscale, self.augmentation, self.crop, self.seed, self.smaller, self.buckets
        )

    @property
    def _streams(self) -> bool:
        return any(options.stream for options in self.regularization)

    def _refuse_moving_cache(self) -> None:
        if self.cache_latents is True and self._streams and self.cache_dir is None:
            raise DataOptionError(
                "data.cache_latents is true and keeps latents in memory, but regularization.stream is for sets that "
                "are larger; name a data.cache_dir, or set one of them to false"
            )
        if self.cache_latents is True and self.why_not_still:
            raise DataOptionError(
                f"data.cache_latents is true, but {self.why_not_still}; set it to auto, or turn that off"
            )

    @property
    def why_not_still(self) -> str:
        """Why latents of instances cannot be kept; "" if they can."""
        return self.geometry.moves(INSTANCE)

    def prepare_data(self) -> None:
        """Draw or fetch regularization sets that are not there yet; one process of a machine does it for all."""
        for options in self.regularization:
            options.fetch()
            if options.generate:
                draw_set(options.generated(self._identity), Path(options.cache), self._generator)

    def setup(self, stage: str | None = None) -> None:
        """Read all pictures and captions once; a second call does nothing.

        Raises:
            DataError: Missing, empty or unusable inputs, or other ones than those of the checkpoint.
            DataOptionError: Options that cannot work together.
        """
        if self.samples:
            return
        read = inputs.Inputs(self.geometry, self.flip, self.seed)
        self.records = read.records
        for index, concept in enumerate(self.concepts):
            read.read_concept(index, concept)
        for index, options in enumerate(self.regularization):
            read.read_set(index, options, self._generator, self._identity)
        read.check(self.concepts, self.regularization, self.strict, self.max_skipped)
        self.samples, self.held_out = read.samples, read.held_out
        if self.cache_latents is True and self._images is None:
            raise DataOptionError("data.cache_latents is true, but no image encoder is bound; call bind before setup")
        if self.cache_latents is not False and self._images is not None and self._keeps_something:
            if self.cache_dir is not None or not self._streams:
                store = TensorStore(self.cache_dir / "latents") if self.cache_dir else None
                self.cache = kept_latents(
                    self.samples, self.geometry, self._images, store, self.task,
                    self.records, self.strict, self.max_skipped,
                )  # fmt: skip
                read.samples = self.samples = list(self.cache.samples)  # without damaged ones of streams
                read.check(self.concepts, self.regularization, self.strict, self.max_skipped)
        if self._expected is not None:
            self.load_state_dict(self._expected)

    @property
    def _keeps_something(self) -> bool:
        return not all(self.geometry.moves(sample.role) for sample in self.samples)

    @property
    def captions(self) -> list[str]:
        """Every caption that training can show, with the prefixes of the resize augmentation."""
        prefixes = ("", *SMALL_PREFIXES, *LARGE_PREFIXES) if self.geometry.augmentation != "none" else ("",)
        said = [(c, prefixes if s.role == INSTANCE else ("",)) for s in self.samples for c in s.captions]
        return list(dict.fromkeys(prefixed(prefix, caption) for caption, before in said for prefix in before))

    @property
    def text_store(self) -> TensorStore | None:
        """Where text states are kept for all runs, if a folder is named for it."""
        return TensorStore(self.cache_dir / "text") if self.cache_dir else None

    # ---- batches ----------------------------------------------------------------------------------

    @property
    def order(self) -> Order:
        """Which sample stands where in every batch."""
        order = inputs.order_of(
            self.samples, self.geometry, self.concepts, self.regularization, self.batch_size, self.mixing
        )
        if self._cursor is None:
            return order
        instances, priors = self._cursor["shown"]
        if len(instances) != len(order.buckets):  # other shapes than then, which was warned of: they begin anew
            instances = ()
        return replace(order, since=self._cursor["cursor"], shown=(tuple(instances), priors))

    @property
    def roles_of_batch(self) -> dict[int, int]:
        """How many pictures of a role a batch has."""
        priors = inputs.per_batch(self.regularization, self.batch_size) if self.regularization else 0
        return {INSTANCE: self.batch_size, PRIOR: priors}

    @property
    def drawn_per_batch(self) -> int:
        """Pictures of a batch that come as pixels; of the others latents are kept."""
        keeps = self.cache_latents is not False and (self.cache_dir is not None or not self._streams)
        return sum(n for role, n in self.roles_of_batch.items() if not keeps or self.geometry.moves(role))

    @property
    def steps(self) -> int:
        """Batches of an epoch: the whole training if the trainer counts steps, else one pass over the instances."""
        if self.trainer is not None and self.trainer.max_steps > 0:
            return self.trainer.max_steps * self.trainer.accumulate_grad_batches
        ranks = self.trainer.world_size if self.trainer is not None else 1
        return sum(-(-bucket.places // (self.batch_size * ranks)) for bucket in self.order.buckets)

    def train_dataloader(self) -> StepLoader[Slot]:
        """Loader of this rank, resumable at every step."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        self._check_ranks(world_size)
        self._world_size = world_size
        slots = functools.partial(_slots, self.order, rank, world_size)
        workers = 0 if self.cache and not self.why_not_still else self.num_workers
        self._loader = StepLoader(slots, self._draw_function(), self.collator, self.steps, workers, self.worker_start)
        if self._cursor is not None:
            self._loader.load_state_dict(self._cursor)
        return self._loader

    def _check_ranks(self, world_size: int) -> None:
        before = self._cursor["world_size"] if self._cursor else world_size
        if before == world_size or self.elastic:
            return
        raise DataOptionError(
            f"the checkpoint is of a training on {before} ranks, this is one on {world_size}: batches would be others; "
            f"start it on {before}, or set data.elastic to true to go on with the rest of the pictures"
        )

    def teardown(self, stage: str | None = None) -> None:
        """End the worker processes, and tell every rank which pictures others found damaged."""
        if self._loader is not None:
            self._loader.close()
        if distributed.is_available() and distributed.is_initialized():
            manifest.share_skipped(self.records)

    def _draw_function(self) -> functools.partial[Drawn]:
        # Workers get the pictures and the geometry, but not the base.
        return functools.partial(draw, self.samples, self.geometry, self.cache.roles if self.cache else ())

    def batch_of_step(self, step: int) -> dict[str, Any]:
        """The mapping of one step, by itself; see the trainer's `Batch` for its fields."""
        view_at = self._draw_function()
        return self.collator([view_at(slot) for slot in self.order.batch(step)])

    @property
    def collator(self) -> Collator:
        """What puts drawn views together with ids, masks and sizes.

        Raises:
            DataOptionError: No encoders are bound.
        """
        if self._text is None or self._images is None:
            raise DataOptionError("no base is bound to the data module; call bind before batches are drawn")
        if self._collator is None:
            time_ids = self._images.needs_time_ids
            instead = Substitution(
                self.samples, self._draw_function(), self.records, self.strict, self.max_skipped
            )
            self._collator = Collator(self.samples, self.geometry, self._text, time_ids, self.cache, instead)
        return self._collator

    def val_dataloader(self) -> FixedLoader:
        """Held-out pictures, the same views every time."""

        def batches() -> Iterator[dict[str, Any]]:
            return self.collator.still_batches(self.held_out, self.batch_size)

        return FixedLoader(batches, len(in_batches(self.held_out, self.geometry, self.batch_size)))

    # ---- resuming ---------------------------------------------------------------------------------

    def _options(self) -> dict[str, Any]:
        return {
            "seed": self.seed, "resolution": self.resolution, "batch_size": self.batch_size, "crop": self.crop,
            "augmentation": self.augmentation, "flip": self.flip, "mixing": self.mixing,
            "concepts.repeats": [concept.repeats for concept in self.concepts],
            "concepts.flip": [concept.flip for concept in self.concepts],
            "concepts.share": [concept.share for concept in self.concepts],
            "smaller": list(self.smaller), "buckets": asdict(self.buckets) if self.buckets else None,
            "regularization.share": [options.share for options in self.regularization],
            "regularization.per_batch": [options.per_batch for options in self.regularization],
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint notes of the data: its hash, its files, the options that decide batches, the cursor.

        Lightning keeps the state of loaders, too, but does not give it back in a run that was resumed at the
        end of an epoch and then again within the next.
        """
        cursor: dict[str, Any] | None = None
        if self._loader is not None:
            cursor = {**self._loader.state_dict(), "world_size": self._world_size}
            cursor["shown"] = list(self.order.shown_at(cursor["cursor"], self._world_size))
        dataset, files = inputs.dataset_hash(self.samples), inputs.files_of(self.samples)
        return {"dataset": dataset, "files": files, "options": self._options(), "cursor": cursor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the cursor, and check that training goes on with the data it began with.

        Raises:
            DataError: Pictures or captions changed; it names some of them.
        """
        self._cursor = state_dict["cursor"]
        if not self.samples:
            self._expected = state_dict
            return
        inputs.compare(state_dict, self.samples, self._options())

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
