"""A generated set is the same whoever draws which part of it, and appears when it is whole."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from lit_datamodules.errors import DataError, DataOptionError
from lit_datamodules.generated_sets import GeneratedSet, draw_set, samples_of
from lit_datamodules.shard_sets import read_shards
from lit_datamodules.shard_writer import write_shards

ASKED = GeneratedSet("a toy", 50, 5, "base")


class Painter:
    """Draws a flat picture whose colour is its seed; may fail at one."""

    def __init__(self, fail_at: int = -1):
        self.asked: list[int] = []
        self.fail_at = fail_at

    def __call__(self, captions: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        if self.fail_at in seeds:
            raise RuntimeError("out of memory")
        self.asked += seeds
        return np.stack([np.full((8, 8, 3), seed, dtype=np.uint8) for seed in seeds])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_set_that_broke_off_is_taken_up(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        draw_set(ASKED, tmp_path, Painter(fail_at=40))
    assert not (tmp_path / ASKED.name).exists(), "what is not whole does not count"
    with pytest.raises(DataOptionError, match="not generated yet"):
        draw_set(ASKED, tmp_path, None)
    painter = Painter()
    folder = draw_set(ASKED, tmp_path, painter)
    assert painter.asked == list(range(37, 55)), "two chunks of sixteen were there"
    assert [p.name for p in tmp_path.iterdir()] == [ASKED.name]
    assert draw_set(ASKED, tmp_path, None) == folder
    assert contents(folder) == contents(draw_set(ASKED, tmp_path / "at once", Painter()))


def test_tasks_share_a_set(tmp_path: Path) -> None:
    alone = contents(draw_set(ASKED, tmp_path / "alone", Painter()))
    painters = [Painter() for _ in range(3)]
    for number in (2, 0, 1):
        folder = draw_set(ASKED, tmp_path / "three", painters[number], (number, 3))
        assert folder.is_dir() == (number == 1), "the last one publishes it"
    assert contents(folder) == alone and len(alone) == 100
    assert sorted(seed for painter in painters for seed in painter.asked) == list(range(5, 55))


def _draw(cache: Path) -> None:
    draw_set(ASKED, cache, Painter())


def test_processes_that_draw_the_same_set_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_draw, args=(tmp_path,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert contents(tmp_path / ASKED.name) == contents(draw_set(ASKED, tmp_path / "alone", Painter()))


def test_a_set_as_shards_says_what_drew_it(tmp_path: Path) -> None:
    folder = draw_set(ASKED, tmp_path, Painter())
    samples = list(samples_of(ASKED, folder))
    write_shards(samples, tmp_path / "reg", 20)
    read = read_shards(0, str(tmp_path / "reg/*.tar"), 64)
    assert [int(s.pixels[0, 0, 0]) for s in read.samples] == list(range(5, 55))
    assert all(record.fate == "used" for record in read.records)
    assert json.loads(samples[3]["json"]) | {"file_sha256": ""} == {
        "generated": True, "prompt": "a toy", "seed": 8, "generator": "base", "file_sha256": ""
    }  # fmt: skip


def test_something_else_than_pictures_is_refused(tmp_path: Path) -> None:
    def draw(captions: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        return np.zeros((len(seeds), 8, 8))

    with pytest.raises(DataError, match=r"gave float64 \(16, 8, 8\), not uint8 \[16, H, W, 3\]"):
        draw_set(ASKED, tmp_path, draw)
