"""Tinyworld pictures in bulk: arrays for training, image folders and WebDataset shards for users."""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from lit_personalize.atomic import replacing
from lit_personalize.tinyworld.captions import caption
from lit_personalize.tinyworld.render import render
from lit_personalize.tinyworld.scene import Kind, Population, Scene, sample_split

CHUNK = 500  # scenes per task; the result does not depend on the number of processes


@dataclass
class Pictures:
    """`pixels` uint8 `[N, 64, 64, 3]` beside the scenes that they show."""

    pixels: np.ndarray
    scenes: list[Scene]

    def __len__(self) -> int:
        return len(self.scenes)


def _render_chunk(task: tuple[int, int, int, str, str, str | None, int]) -> tuple[np.ndarray, list[Scene]]:
    seed, index, count, split, population, kind, size = task
    rng = np.random.default_rng([seed, index])
    scenes = [sample_split(rng, split, population, kind) for _ in range(count)]  # type: ignore[arg-type]
    return np.stack([render(scene, size) for scene in scenes]), scenes


def sample_pictures(
    count: int,
    seed: int,
    split: Literal["train", "test"] = "train",
    population: Population = "base",
    kind: Kind | None = None,
    size: int = 64,
    processes: int = 1,
) -> Pictures:
    """Render `count` random scenes. Chunk `i` uses its own generator, so more scenes extend fewer."""
    tasks = [
        (seed, start // CHUNK, min(CHUNK, count - start), split, population, kind, size)
        for start in range(0, count, CHUNK)
    ]
    if processes > 1 and len(tasks) > 1:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            parts = pool.map(_render_chunk, tasks, chunksize=1)
            pool.close()
            pool.join()
    else:
        parts = [_render_chunk(task) for task in tasks]
    return Pictures(np.concatenate([p for p, _ in parts]), [s for _, scenes in parts for s in scenes])


def kept_pictures(pixels: Path, scenes: Path, make: Callable[[], Pictures], mapped: bool = False) -> Pictures:
    """Pictures that lie in two files, made and written there first if they do not.

    Args:
        pixels: `.npy` file.
        scenes: JSON, one scene a line.
        mapped: Read pixels from the disk as they are asked for.
    """
    if not (pixels.exists() and scenes.exists()):
        made = make()
        pixels.parent.mkdir(parents=True, exist_ok=True)
        np.save(pixels, made.pixels)
        with scenes.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(scene.to_dict()) + "\n" for scene in made.scenes)
    with scenes.open(encoding="utf-8") as stream:
        told = [Scene.from_dict(json.loads(line)) for line in stream]
    return Pictures(np.load(pixels, mmap_mode="r" if mapped else None), told)


def write_folder(pictures: Pictures, folder: Path, seed: int = 0) -> None:
    """Write `00000.png` with a `.txt` caption and a `.json` scene beside each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i, (pixels, scene) in enumerate(zip(pictures.pixels, pictures.scenes, strict=True)):
        Image.fromarray(pixels).save(folder / f"{i:05d}.png")
        (folder / f"{i:05d}.txt").write_text(caption(scene, rng) + "\n", encoding="utf-8")
        (folder / f"{i:05d}.json").write_text(json.dumps(scene.to_dict()), encoding="utf-8")


def write_photos_with(captions: Iterable[str], pictures: Pictures, folder: Path) -> None:
    """Write `00000.png` with its caption in `00000.txt` beside it into a new folder."""
    folder.mkdir(parents=True)
    for i, (pixels, said) in enumerate(zip(pictures.pixels, captions, strict=True)):
        Image.fromarray(pixels).save(folder / f"{i:05d}.png")
        (folder / f"{i:05d}.txt").write_text(said + "\n", encoding="utf-8")


def write_shards(pictures: Pictures, folder: Path, per_shard: int = 1000, seed: int = 0) -> list[Path]:
    """Write img2dataset-style shards `00000.tar` with `jpg`, `txt` and `json` per sample."""
    rng = np.random.default_rng(seed)
    paths = []
    for shard, start in enumerate(range(0, len(pictures), per_shard)):
        paths.append(folder / f"{shard:05d}.tar")
        part = slice(start, start + per_shard)
        shown = zip(pictures.pixels[part], pictures.scenes[part], strict=True)
        write_tar((sample_of(pixels, caption(scene, rng), scene.to_dict()) for pixels, scene in shown), paths[-1])
    return paths


def sample_of(pixels: np.ndarray, text: str, about: dict[str, Any]) -> dict[str, bytes]:
    """A picture uint8 `[H, W, 3]`, its caption and its fields as the members of a shard."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=97, subsampling=0)
    return {"jpg": buffer.getvalue(), "txt": text.encode(), "json": json.dumps(about).encode()}


def write_tar(samples: Iterable[dict[str, bytes]], path: Path) -> None:
    """Write one shard, all or nothing; keys are the shard's name and four digits."""
    with replacing(path) as temporary, tarfile.open(temporary, "w") as tar:
        for number, sample in enumerate(samples):
            for suffix, data in sample.items():
                info = tarfile.TarInfo(f"{path.stem}{number:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def read_tar(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members of every sample of a shard, in its order."""
    with tarfile.open(path) as tar:
        for key, members in itertools.groupby(tar, key=lambda member: member.name.rpartition(".")[0]):
            yield key, {m.name.rpartition(".")[2]: tar.extractfile(m).read() for m in members}  # type: ignore[union-attr]
