"""Pictures with captions near the concept's class: from shards, from a folder, or drawn by the base."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lit_datamodules.captions import read_caption
from lit_datamodules.errors import DataError, DataOptionError
from lit_datamodules.image_files import list_images, read_image, to_rgb
from lit_datamodules.manifest import sha256_of
from lit_datamodules.protocols import Generator


@dataclass
class Regularization:
    """One regularization set. Give exactly one of `shards`, `folder` and `generate`.

    Args:
        shards: WebDataset tar files with `jpg|png` and `txt` per sample; braces are expanded.
        folder: Pictures with sidecar `.txt` captions.
        generate: Number of pictures that the base draws from `prompt`.
        prompt: Caption of generated pictures, and of those in a folder that have none.
        cache: Where generated pictures are kept.
    """

    shards: str | None = None
    folder: str | None = None
    generate: int = 0
    prompt: str = ""
    cache: str = "regularization"

    def __post_init__(self) -> None:
        if sum(map(bool, (self.shards, self.folder, self.generate))) != 1:
            raise DataOptionError("a regularization set has exactly one of shards, folder and generate")
        if self.generate and not self.prompt:
            raise DataOptionError("regularization.generate needs regularization.prompt, such as 'photo of a cat'")


@dataclass(frozen=True)
class Picture:
    """A decoded input: uint8 `[H, W, 3]`, its caption, where it is from and the hash of its bytes."""

    pixels: np.ndarray
    caption: str
    source: str
    sha256: str


def expand_braces(pattern: str) -> list[Path]:
    """`a/{00..03}.tar` to four paths."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [Path(pattern)]
    low, high = match.groups()
    numbers = range(int(low), int(high) + 1)
    return [Path(pattern[: match.start()] + str(n).zfill(len(low)) + pattern[match.end() :]) for n in numbers]


def read_shards(pattern: str) -> list[Picture]:
    """Every sample of WebDataset shards, in their order.

    Raises:
        DataError: A shard is missing or cut off, or a sample lacks picture or caption.
    """
    import webdataset

    pictures = []
    for path in expand_braces(pattern):
        if not path.is_file():
            raise DataError(f"regularization shard {path} does not exist")
        before = len(pictures)
        try:
            for sample in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False):
                pictures.append(_picture_of(sample, path))
        except DataError:
            raise
        except Exception as error:  # noqa: BLE001 - tar, pipe and codec errors alike mean: this shard is damaged
            good = len(pictures) - before
            raise DataError(f"regularization shard {path} is damaged after sample {good}: {error}") from error
        if len(pictures) == before:
            raise DataError(f"regularization shard {path} holds no sample")
    return pictures


def _picture_of(sample: dict[str, object], shard: Path) -> Picture:
    key = f"{shard.name}:{sample['__key__']}"
    data = next((sample[s] for s in ("jpg", "jpeg", "png", "webp") if s in sample), None)
    text = sample.get("txt")
    if not isinstance(data, bytes) or not isinstance(text, bytes):
        raise DataError(f"sample {key} lacks a picture or its txt caption")
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = to_rgb(image)
        caption = " ".join(text.decode("utf-8").split())
    except (OSError, ValueError) as error:
        raise DataError(f"sample {key} is damaged: {error}") from error
    if not caption:
        raise DataError(f"sample {key} has an empty caption")
    return Picture(pixels, caption, key, sha256_of(data))


def read_folder(folder: Path, prompt: str) -> list[Picture]:
    """Pictures of a folder with their sidecar captions, or with `prompt`."""
    pictures = []
    for path in list_images(folder):
        sidecar = path.with_suffix(".txt")
        caption = read_caption(sidecar) if sidecar.exists() else prompt
        if not caption:
            raise DataError(f"{path} has no caption file {sidecar.name}, and regularization.prompt is empty")
        pictures.append(Picture(read_image(path), caption, str(path), sha256_of(path.read_bytes())))
    return pictures


def generate_folder(options: Regularization, generator: Generator, identity: str) -> Path:
    """Draw the set once and keep it; a folder that was cut off in the making is made again."""
    key = hashlib.sha256(f"{identity}|{options.prompt}|{options.generate}".encode()).hexdigest()[:16]
    folder = Path(options.cache) / f"generated-{key}"
    if folder.exists():
        return folder
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    partial.mkdir(parents=True, exist_ok=True)
    for start in range(0, options.generate, 32):
        seeds = list(range(start, min(start + 32, options.generate)))
        for seed, pixels in zip(seeds, generator([options.prompt] * len(seeds), seeds), strict=True):
            Image.fromarray(pixels).save(partial / f"{seed:05d}.png")
            (partial / f"{seed:05d}.txt").write_text(options.prompt + "\n", encoding="utf-8")
    try:
        partial.rename(folder)
    except OSError:  # another process was first; its set is the same
        shutil.rmtree(partial)
    return folder


def load(options: Regularization, generator: Generator | None, identity: str) -> list[Picture]:
    """All pictures of one set."""
    if options.shards:
        return read_shards(options.shards)
    if options.folder:
        return read_folder(Path(options.folder), options.prompt)
    if generator is None:
        raise DataOptionError("a generated regularization set needs a base that draws it")
    return read_folder(generate_folder(options, generator, identity), options.prompt)
