"""One folder of pictures, from which a concept is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from lit_datamodules import manifest
from lit_datamodules.captions import fill, lacks_token, prompts_of, read_caption
from lit_datamodules.errors import DataError, DataOptionError
from lit_datamodules.image_files import Picture, list_images, read_image, shrunk
from lit_datamodules.manifest import Record
from lit_datamodules.order import INSTANCE, counter_rng
from lit_datamodules.stored_picture import StoredPicture


@dataclass
class Concept:
    """What is learned from one folder.

    Args:
        path: Folder of jpg, png or webp files; a `.txt` of the same name is a picture's caption.
        class_noun: For example "cat"; may be empty for styles.
        token: Modifier token such as "<new1>", if one is trained; every caption must name it.
        prompt: Caption of pictures without a `.txt`: a sentence with `{}` (token and noun) or `{token}`
            and `{class}`, a list of sentences that take turns at random, or the name of a template set
            ("object", "style").
        captions: "sidecar" demands a `.txt` for each picture, "prompt" passes over them.
        repeats: How often each picture counts within an epoch.
        share: Of several concepts that take turns, how much of a batch is this one's, such as 2 beside another's 1.
        flip: Share of mirrored views; None takes that of the data module.
        alpha_mask: Count only opaque parts of pictures with transparency in the loss.
        masks: Folder with a picture of the same name (any suffix) and size for each, white where the loss counts.
        held_out: Number of pictures that are kept for validation.
        name: For titles; by default token and noun.
    """

    path: str
    class_noun: str = ""
    token: str | None = None
    prompt: str | list[str] = "photo of a {}"
    captions: Literal["auto", "sidecar", "prompt"] = "auto"
    repeats: int = 1
    share: float = 1.0
    flip: float | None = None
    alpha_mask: bool = False
    masks: str | None = None
    held_out: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise DataOptionError(f"concept {self.title}: repeats must be at least 1, not {self.repeats}")
        if self.share <= 0:
            raise DataOptionError(f"concept {self.title}: share must be above 0, not {self.share}")
        if self.alpha_mask and self.masks:
            raise DataOptionError(f"concept {self.title}: the loss is masked by alpha_mask or by masks, not by both")
        if self.flip is not None and not 0 <= self.flip <= 1:
            raise DataOptionError(f"concept {self.title}: flip is a share in [0, 1], not {self.flip}")
        if self.held_out < 0:
            raise DataOptionError(f"concept {self.title}: held_out must not be negative, not {self.held_out}")

    @property
    def title(self) -> str:
        return self.name or f"{self.token or ''} {self.class_noun}".strip() or Path(self.path).name


@dataclass(frozen=True)
class Sample:
    """One picture with the captions that it takes turns in."""

    picture: np.ndarray | StoredPicture
    """uint8 `[H, W, 3]`, upright, larger than training needs at most by a small factor; or where it lies."""
    original: tuple[int, int]
    """Height and width of the upright file."""
    captions: tuple[str, ...]
    name: str
    """Path of the file, or `shard.tar:key`."""
    role: int
    concept: int = 0
    """Index of the concept, or of the regularization set."""
    alpha: np.ndarray | None = None
    """uint8 `[H, W]`, where it masks the loss."""
    flip: float = 0.0
    record: Record | None = None
    mask_sha256: str = ""
    """Of the file that `alpha` was read from, where it is not the picture's own."""

    @property
    def pixels(self) -> np.ndarray:
        """uint8 `[H, W, 3]`; a stored picture is read.

        Raises:
            DataError: It cannot be read.
        """
        return self.picture.load() if isinstance(self.picture, StoredPicture) else self.picture

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of `pixels`."""
        if isinstance(self.picture, StoredPicture):
            return self.picture.size
        return self.picture.shape[0], self.picture.shape[1]

    @property
    def identity(self) -> str:
        """What tells its bytes from others: a hash, or place and hash of its shard."""
        if isinstance(self.picture, StoredPicture):
            return self.picture.sha256 or self.picture.identity
        return self.record.sha256 if self.record else ""


@dataclass
class FolderContents:
    """What a folder or a shard gave: samples for training, held-out ones, and the fate of every file."""

    samples: list[Sample] = field(default_factory=list)
    held_out: list[Sample] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)


def read_concept(index: int, concept: Concept, flip: float, longest: int, seed: int) -> FolderContents:
    """Read a concept's folder; what cannot be used becomes a record with its reason.

    Args:
        index: Number of the concept.
        flip: Share of mirrored views, unless the concept says otherwise.
        longest: Shorter side in pixels above which pictures are shrunk to save memory.
        seed: Chooses the held-out pictures.

    Raises:
        DataError: The folder is missing or holds no picture.
        DataOptionError: The prompt is unknown or lacks the token, or nothing is left to train on.
    """
    prompts = prompts_of(concept.prompt, concept.token, concept.class_noun)
    folder = Path(concept.path)
    paths = list_images(folder)
    masks = list_images(Path(concept.masks)) if concept.masks else []
    if concept.held_out >= len(paths):
        raise DataOptionError(f"concept {concept.title}: held_out {concept.held_out} of {len(paths)} leaves no picture")
    order = counter_rng(seed, "held-out", folder.name).permutation(len(paths))
    kept_back = {paths[int(i)] for i in order[: concept.held_out]}
    contents = FolderContents()
    sidecars: dict[Path, list[str]] = {}
    for path in paths:
        role = "held out" if path in kept_back else "concept"
        sidecar = path.with_suffix(".txt")
        has_sidecar = sidecar.is_file() and concept.captions != "prompt"
        if has_sidecar:
            sidecars.setdefault(sidecar, []).append(path.name)
        try:
            if concept.captions == "sidecar" and not has_sidecar:
                raise DataError(f"{path} has no caption {sidecar.name}; write one, or set captions to auto")
            captions = (_sidecar_caption(sidecar, concept),) if has_sidecar else prompts
            picture = read_image(path)
            mask = mask_file(masks, concept.masks, path) if concept.masks else None
            if mask is not None:
                picture = masked(picture, path, mask)
        except DataError as error:
            contents.records.append(Record(str(path), "skipped", str(error), role, concept.title))
            continue
        record = record_of(
            picture, str(path), path.read_bytes(), role, concept.title, captions[0],
            sidecar.name if has_sidecar else "prompt",
        )  # fmt: skip
        record = replace(record, mask=str(mask or ""))
        contents.records.append(record)
        share = concept.flip if concept.flip is not None else flip
        counts = concept.alpha_mask or mask is not None
        sample = sample_of(picture, record, captions, INSTANCE, index, longest, counts, share)
        if mask is not None:
            sample = replace(sample, mask_sha256=manifest.sha256_of(mask.read_bytes()))
        (contents.held_out if path in kept_back else contents.samples).append(sample)
    contents.records += [
        Record(str(path), "used", f"caption of {' and '.join(names)}", "caption", concept.title,
               sha256=manifest.sha256_of(path.read_bytes()))
        for path, names in sidecars.items()
    ]  # fmt: skip
    contents.records += manifest.ignore_rest(folder, (record.path for record in contents.records))
    return contents


def mask_file(masks: Sequence[Path], folder: str, path: Path) -> Path:
    """The one of the `masks` in `folder` that has the name of `path`, whatever its suffix.

    Raises:
        DataError: There is none, or there are several.
    """
    found = [mask for mask in masks if mask.stem == path.stem]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{path} has several masks in {folder}: {', '.join(m.name for m in found)}; keep one")
    raise DataError(f"{path} has no mask {path.stem}.png in {folder}; draw one (white where the loss counts)")


def masked(picture: Picture, path: Path, mask: Path) -> Picture:
    """A picture whose alpha is the brightness of a mask of its size.

    Raises:
        DataError: The mask cannot be read, has another size, or is all black.
    """
    bright = np.asarray(Image.fromarray(read_image(mask).pixels).convert("L"))
    if bright.shape != picture.size:
        sizes = "{1} x {0} pixels, {3} x {2}".format(*bright.shape, *picture.size)
        raise DataError(f"mask {mask} and its picture {path} differ in size ({sizes}); draw it on the upright picture")
    if not bright.any():
        raise DataError(f"mask {mask} is all black: nothing of {path} would count; white marks what counts")
    return replace(picture, alpha=bright)


def _sidecar_caption(path: Path, concept: Concept) -> str:
    caption = fill(read_caption(path), concept.token, concept.class_noun)
    if reason := lacks_token(caption, concept.token):
        raise DataError(f"caption {path}: {reason}")
    return caption


def record_of(picture: Picture, name: str, data: bytes, role: str, concept: str, caption: str, source: str) -> Record:
    """The record of a picture that is used."""
    height, width = picture.size
    return Record(
        name, "used", "", role, concept, width, height, picture.mode, manifest.sha256_of(data),
        caption=caption, caption_source=source,
    )  # fmt: skip


def sample_of(
    picture: Picture,
    record: Record,
    captions: tuple[str, ...],
    role: int,
    concept: int,
    longest: int,
    alpha_mask: bool = False,
    flip: float = 0.0,
) -> Sample:
    """A sample that keeps no more pixels than training can show."""
    small = shrunk(picture, longest)
    alpha = small.alpha if alpha_mask else None
    return Sample(small.pixels, picture.size, captions, record.path, role, concept, alpha, flip, record)
