"""A corpus of picture-text pairs as the web has them: any number of scenes, captions that often leave out the noun.

Held-out shapes, colours and textures are among them, so that every class has near neighbours. A shard is a function
of the seed and its number: what a stopped start left is kept, and the result does not depend on the processes.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lit_personalize.atomic import write_text
from lit_personalize.errors import DataError
from lit_personalize.tinyworld.dataset import sample_of, write_tar
from lit_personalize.tinyworld.paraphrases import alt_text, facts
from lit_personalize.tinyworld.render import render
from lit_personalize.tinyworld.scene import Scene, sample_scene
from lit_personalize.tinyworld.training import Log

ABOUT = "corpus.json"


def write_corpus(
    folder: Path, count: int, per_shard: int = 1000, seed: int = 0, processes: int = 1, log: Log = print
) -> list[Path]:
    """Render the shards that `folder` lacks; `json` holds the scene, its "facts" and those that the caption "said".

    Raises:
        DataError: The folder holds another corpus.
    """
    about = {"count": count, "per_shard": per_shard, "seed": seed}
    place = folder / ABOUT
    if place.exists() and (found := json.loads(place.read_text(encoding="utf-8"))) != about:
        raise DataError(f"{folder} holds another corpus ({found}, not {about}); name another folder")
    write_text(place, json.dumps(about) + "\n")
    paths = [folder / f"{number:05d}.tar" for number in range(-(-count // per_shard))]
    tasks = [
        (path, min(per_shard, count - number * per_shard), [seed, number])
        for number, path in enumerate(paths)
        if not path.exists()
    ]
    if processes > 1 and len(tasks) > 1:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            _tell(pool.imap_unordered(_write_shard, tasks), len(tasks), log)
            pool.close()  # workers end by themselves, also where SIGTERM is ignored
            pool.join()
    else:
        _tell(map(_write_shard, tasks), len(tasks), log)
    return paths


def _tell(written: Iterable[Path], of: int, log: Log) -> None:
    for done, path in enumerate(written, start=1):
        log(f"{path.name} ({done} of {of})")


def _write_shard(task: tuple[Path, int, list[int]]) -> Path:
    path, count, seed = task
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, "all") for _ in range(count)]
    write_tar((_sample(scene, rng) for scene in scenes), path)
    return path


def _sample(scene: Scene, rng: np.random.Generator) -> dict[str, bytes]:
    text, said = alt_text(scene, rng)
    return sample_of(render(scene), text, scene.to_dict() | {"facts": sorted(facts(scene)), "said": sorted(said)})
