"""The data module of personalization: a few pictures per concept, and a regularization set beside them.

Batch k is a function of (seed, k): instances first, then as many regularization pictures, each half
walking through its own epochs. The mapping it delivers has the field names of the trainer's `Batch`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from lit_datamodules import manifest, regularization, sheet
from lit_datamodules.captions import check_token, prompts_of, read_caption
from lit_datamodules.errors import DataError, DataOptionError
from lit_datamodules.image_files import list_images, read_image
from lit_datamodules.order import counter_rng, samples_of_step
from lit_datamodules.protocols import Generator, ImageEncoder, TextEncoder
from lit_datamodules.regularization import Picture, Regularization
from lit_datamodules.resize_augmentation import (
    Variant,
    View,
    apply_view,
    custom_diffusion_view,
    latent_mask,
    square_crop,
)
from lit_datamodules.step_loader import StepLoader

Augmentation = Literal["none", "custom_diffusion", "custom_diffusion_port"]
INSTANCE, PRIOR = 0, 1


@dataclass
class Concept:
    """What is learned from one folder of pictures.

    Args:
        path: Folder of pictures; a `.txt` of the same name is a picture's caption.
        class_noun: For example "cat".
        token: Modifier token such as "<new1>", if one is trained.
        prompt: Caption of pictures without a `.txt`: a sentence with `{token}` and `{class}`, or the
            name of a template set ("object", "style").
        repeats: How often each picture counts within an epoch.
    """

    path: str
    class_noun: str
    token: str | None = None
    prompt: str = "photo of a {token} {class}"
    repeats: int = 1


@dataclass(frozen=True)
class Sample:
    """One training picture: a square crop is cut from it, `captions` are equally likely."""

    picture: Picture
    captions: tuple[str, ...]
    concept: int
    role: int


class PersonalizationData(pl.LightningDataModule):
    """Concept folders and regularization sets as batches.

    Args:
        concepts: Learned together; each picture belongs to one.
        regularization: Sets from which every batch takes as many pictures as it has instances.
        resolution: Side of the training views in pixels.
        batch_size: Instances per batch; with regularization a batch has twice as many samples.
        augmentation: "custom_diffusion" resizes instances at random, with masks and prompt prefixes.
        crop: Of pictures that are not square: "center" or "random".
        flip: Mirror half of all views.
        cache_latents: Encode every picture once; "auto" where views do not change.
        strict: A damaged picture is an error; otherwise up to `max_skipped` are skipped and recorded.
        seed: Of order and views.
    """

    def __init__(
        self,
        concepts: list[Concept],
        resolution: int,
        regularization: list[Regularization] | None = None,
        batch_size: int = 1,
        augmentation: Augmentation = "none",
        crop: Literal["center", "random"] = "center",
        flip: bool = False,
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
        self.concepts = concepts
        self.resolution = resolution
        self.regularization = regularization or []
        self.batch_size = batch_size
        self.augmentation = augmentation
        self.crop = crop
        self.flip = flip
        self.cache_latents = cache_latents
        self.num_workers = num_workers
        self.strict = strict
        self.max_skipped = max_skipped
        self.seed = seed
        self.records: list[manifest.Record] = []
        self.instances: list[Sample] = []
        self.priors: list[Sample] = []
        self._latents: dict[tuple[int, int, bool], tuple[Tensor, Tensor]] = {}
        self._text: TextEncoder | None = None
        self._images: ImageEncoder | None = None
        self._generator: Generator | None = None
        self._identity = ""

    def bind(
        self,
        text_encoder: TextEncoder,
        image_encoder: ImageEncoder,
        generator: Generator | None = None,
        identity: str = "",
    ) -> None:
        """Give the module a base's encoders, before `setup`; `identity` names the base."""
        self._text, self._images, self._generator, self._identity = text_encoder, image_encoder, generator, identity

    # ---- reading ----------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Read all pictures and captions once; a second call does nothing."""
        if self.instances:
            return
        self._check_cache_option()
        for index, concept in enumerate(self.concepts):
            self.instances += self._read_concept(index, concept)
        for options in self.regularization:
            for picture in regularization.load(options, self._generator, self._identity):
                self.priors.append(Sample(picture, (picture.caption,), -1, PRIOR))
                self._record(picture, "regularization", "prior")
        if self._caches:
            self._encode_all()

    def _check_cache_option(self) -> None:
        moving = self.augmentation != "none" or self.crop == "random"
        if self.cache_latents is True and moving:
            raise DataOptionError("cache_latents: true would freeze views that augmentation or random crops change")
        self._caches = self._images is not None and not moving and self.cache_latents is not False

    def _read_concept(self, index: int, concept: Concept) -> list[Sample]:
        prompts = tuple(prompts_of(concept.prompt, concept.token, concept.class_noun))
        samples: list[Sample] = []
        for path in list_images(Path(concept.path)):
            sidecar = path.with_suffix(".txt")
            try:
                pixels = read_image(path)
                captions = (read_caption(sidecar),) if sidecar.exists() else prompts
                for caption in captions:
                    check_token(caption, concept.token, str(sidecar if sidecar.exists() else path))
            except DataError as error:
                if self.strict:
                    raise
                self.records.append(manifest.Record(str(path), "skipped", str(error), concept.class_noun))
                if sum(r.fate == "skipped" for r in self.records) > self.max_skipped:
                    raise DataError(f"more than {self.max_skipped} pictures are unusable; the last: {error}") from error
                continue
            picture = Picture(pixels, captions[0], str(path), manifest.sha256_of(path.read_bytes()))
            self._record(picture, concept.class_noun, "sidecar" if sidecar.exists() else "prompt")
            samples += [Sample(picture, captions, index, INSTANCE)] * concept.repeats
        if not samples:
            raise DataError(f"no picture of {concept.path} can be used; see the reasons in the manifest")
        return samples

    def _record(self, picture: Picture, concept: str, source: str) -> None:
        height, width = picture.pixels.shape[:2]
        self.records.append(
            manifest.Record(
                picture.source, "used", "", concept, width, height, picture.sha256, picture.caption, source
            )
        )

    @property
    def identity(self) -> str:
        """Hash of everything that decides what batch k is."""
        options = {
            "records": [asdict(r) for r in self.records], "seed": self.seed, "resolution": self.resolution,
            "batch_size": self.batch_size, "augmentation": self.augmentation, "crop": self.crop, "flip": self.flip,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:16]

    # ---- views ------------------------------------------------------------------------------------

    def _square(self, sample: Sample, rng: np.random.Generator | None) -> tuple[np.ndarray, int, int]:
        """The square crop of a picture and its corner in the picture scaled to the resolution."""
        height, width = sample.picture.pixels.shape[:2]
        top, left, side = square_crop(height, width, rng)
        scale = self.resolution / side
        return sample.picture.pixels[top : top + side, left : left + side], round(top * scale), round(left * scale)

    def _view(self, sample: Sample, step: int, position: int) -> tuple[View, np.random.Generator]:
        rng = counter_rng(self.seed, "view", step, position)
        view = View(self.resolution, self.resolution)
        if self.augmentation != "none" and sample.role == INSTANCE:
            variant: Variant = "port" if self.augmentation == "custom_diffusion_port" else "paper"
            view = custom_diffusion_view(rng, self.resolution, variant)
        if self.flip and rng.random() < 0.5:
            view = View(**{**asdict(view), "flip": True})
        return view, rng

    def _draw(self, sample: Sample, step: int, position: int) -> dict[str, Any]:
        """One sample of a batch, not yet collated."""
        view, rng = self._view(sample, step, position)
        caption = view.prefix + sample.captions[int(rng.integers(len(sample.captions)))]
        square, top, left = self._square(sample, rng if self.crop == "random" else None)
        height, width = sample.picture.pixels.shape[:2]
        drawn: dict[str, Any] = {
            "caption": caption,
            "view": view,
            "time_ids": [height, width, top, left, self.resolution, self.resolution],
        }
        if not self._caches:
            drawn["pixels"] = apply_view(square, view)
        return drawn

    def _encode_all(self) -> None:
        """Posteriors of every picture, and of its mirror image where views are flipped."""
        images = self._images
        if images is None:
            raise DataOptionError("bind an image encoder before caching latents")
        for samples in (self.instances, self.priors):
            for index, sample in enumerate(samples):
                for flip in (False, True) if self.flip else (False,):
                    square, _, _ = self._square(sample, None)
                    view = View(self.resolution, self.resolution, flip=flip)
                    mean, std = images.encode_pixels(torch.from_numpy(apply_view(square, view))[None])
                    self._latents[sample.role, index, flip] = (mean[0].cpu(), std[0].cpu())

    # ---- batches ----------------------------------------------------------------------------------

    def _chosen(self, step: int) -> list[tuple[list[Sample], int]]:
        """Instances of a step, then as many pictures of the regularization sets."""
        pools = [("instance", self.instances), ("prior", self.priors)]
        return [
            (pool, index)
            for purpose, pool in pools
            if pool
            for index in samples_of_step(self.seed, purpose, step, self.batch_size, len(pool))
        ]

    def batch_of_step(self, step: int) -> dict[str, Any]:
        """The mapping of one step; see the trainer's `Batch` for its fields."""
        chosen = self._chosen(step)
        samples = [pool[i] for pool, i in chosen]
        drawn = [self._draw(sample, step, position) for position, sample in enumerate(samples)]
        captions = [d["caption"] for d in drawn]
        if self._text is None:
            raise DataOptionError("bind a text encoder before drawing batches")
        batch: dict[str, Any] = {
            "role": torch.tensor([s.role for s in samples]),
            "position": torch.arange(len(samples)),
            "concept": torch.tensor([s.concept for s in samples]),
            "sample_id": [s.picture.source for s in samples],
            "captions": captions,
            "input_ids": self._text.tokenize(captions),
        }
        if self._images is not None and self._images.needs_time_ids:
            batch["time_ids"] = torch.tensor([d["time_ids"] for d in drawn], dtype=torch.float32)
        if self._caches:
            keys = [(s.role, i, d["view"].flip) for s, (_, i), d in zip(samples, chosen, drawn, strict=True)]
            batch["latent_mean"] = torch.stack([self._latents[k][0] for k in keys])
            batch["latent_std"] = torch.stack([self._latents[k][1] for k in keys])
        else:
            batch["pixels"] = torch.from_numpy(np.stack([d["pixels"] for d in drawn]))
        if self.augmentation != "none" and self._images is not None:
            masks = [latent_mask(d["view"], self._images.downscale) for d in drawn]
            batch["mask"] = torch.from_numpy(np.stack(masks))
        return batch

    @property
    def steps(self) -> int:
        """Batches of the one long epoch: the trainer's steps, or one pass over the instances."""
        if self.trainer is not None and self.trainer.max_steps > 0:
            return self.trainer.max_steps * self.trainer.accumulate_grad_batches
        return -(-len(self.instances) // self.batch_size)

    def train_dataloader(self) -> StepLoader:
        return StepLoader(self.batch_of_step, self.steps, self.identity, self.num_workers)

    # ---- reports ----------------------------------------------------------------------------------

    def write_manifest(self, path: Path) -> None:
        """Write the fate of every input file."""
        manifest.write_manifest(self.records, path)

    def write_sheet(self, path: Path, per_row: int = 16) -> None:
        """Write the first views that training will see, by concept, and of the regularization set."""
        cells = 8 if self._images is None else self._images.downscale
        rows: dict[str, list[sheet.Tile]] = {}
        for step in range(-(-per_row // self.batch_size)):
            for position, (pool, index) in enumerate(self._chosen(step)):
                sample = pool[index]
                title = self._title(sample)
                view, rng = self._view(sample, step, position)
                caption = view.prefix + sample.captions[int(rng.integers(len(sample.captions)))]
                square, _, _ = self._square(sample, rng if self.crop == "random" else None)
                mask = latent_mask(view, cells) if view.pasted else None
                rows.setdefault(title, []).append(
                    sheet.Tile(apply_view(square, view), caption, Path(sample.picture.source).name, mask)
                )
        sheet.write_sheet({k: rows[k] for k in sorted(rows, reverse=True)}, path)

    def _title(self, sample: Sample) -> str:
        if sample.role == PRIOR:
            return f"regularization set: {len(self.priors)} pictures"
        concept = self.concepts[sample.concept]
        count = len({s.picture.source for s in self.instances if s.concept == sample.concept})
        return f"concept {concept.token or ''} {concept.class_noun}: {count} pictures"
