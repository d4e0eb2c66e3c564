"""Regularization pictures that the untouched base draws: each a function of its prompt and its own seed.

So it does not matter which process draws which, or when: several share the work, a killed one is taken up, and the
folder appears under its name when it is whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lit_datamodules.errors import DataError, DataOptionError
from lit_datamodules.manifest import sha256_of
from lit_datamodules.protocols import Generator

CHUNK = 16
"""Pictures that are drawn at once; each is the same whichever others stand beside it."""


@dataclass(frozen=True)
class GeneratedSet:
    """What decides the pictures of a set.

    Args:
        prompt: Caption of all pictures.
        count: How many.
        seed: Of the first; the next has the next number.
        identity: Of what draws: the base, its precision, scheduler, steps and guidance.
    """

    prompt: str
    count: int
    seed: int
    identity: str

    @property
    def name(self) -> str:
        """Sixteen hex digits."""
        key = json.dumps([self.identity, self.prompt, self.count, self.seed])
        return hashlib.sha256(key.encode()).hexdigest()[:16]


def draw_set(asked: GeneratedSet, cache: Path, generator: Generator | None, task: tuple[int, int] = (0, 1)) -> Path:
    """Draw what is missing of a set, and publish it when it is whole.

    Args:
        cache: Folder in which sets lie by their names.
        task: Draw every `task[1]`-th chunk of pictures, from the `task[0]`-th on.

    Returns:
        The folder, which exists if the set is whole.

    Raises:
        DataOptionError: Something is missing, and no base is bound that could draw it.
        DataError: The base gave something else than pictures.
    """
    folder = cache / asked.name
    if folder.is_dir():
        return folder
    if generator is None:
        raise DataOptionError(f"the regularization set {asked.prompt!r} is not generated yet, and no base is bound")
    partial = cache / f".partial-{asked.name}"
    partial.mkdir(parents=True, exist_ok=True)
    for start in range(task[0] * CHUNK, asked.count, task[1] * CHUNK):
        numbers = [n for n in range(start, min(start + CHUNK, asked.count)) if not _picture(partial, n).exists()]
        if not numbers:
            continue
        drawn = _as_array(generator([asked.prompt] * len(numbers), [asked.seed + n for n in numbers]))
        if drawn.shape[0] != len(numbers) or drawn.dtype != np.uint8 or drawn.shape[-1] != 3:
            raise DataError(f"the generator gave {drawn.dtype} {drawn.shape}, not uint8 [{len(numbers)}, H, W, 3]")
        for number, pixels in zip(numbers, drawn, strict=True):
            _write(_picture(partial, number).with_suffix(".txt"), asked.prompt.encode() + b"\n")
            _write(_picture(partial, number), _png(pixels))
    if all(_picture(partial, n).exists() for n in range(asked.count)):
        try:
            os.replace(partial, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first; the same seeds gave it the same pictures
                raise
    return folder


def samples_of(asked: GeneratedSet, folder: Path) -> Iterator[dict[str, bytes]]:
    """The pictures of a whole set for `shard_writer.write_shards`, with what drew them."""
    for number in range(asked.count):
        data = _picture(folder, number).read_bytes()
        about = {
            "generated": True, "prompt": asked.prompt, "seed": asked.seed + number, "generator": asked.identity,
            "file_sha256": sha256_of(data),
        }  # fmt: skip
        yield {"png": data, "txt": asked.prompt.encode(), "json": json.dumps(about).encode()}


def _picture(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.png"


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    """All or nothing, by way of a file outside the set: another process may publish it at any moment."""
    temporary = path.parent.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except FileNotFoundError:
        if path.parent.exists():
            raise
        # Another process has published the set meanwhile, with the same picture in it.
    finally:
        temporary.unlink(missing_ok=True)


def _as_array(drawn: Any) -> np.ndarray:
    return np.asarray(drawn.cpu() if hasattr(drawn, "cpu") else drawn)
