"""Regularization sets from shards, folders and the base; damage is found, named and counted."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lit_datamodules.concept_folder import Concept
from lit_datamodules.errors import DataError, DataOptionError
from lit_datamodules.personalization import PersonalizationData
from lit_datamodules.regularization import Regularization, read_folder, read_set
from lit_datamodules.shard_sets import read_shards

Write = Callable[..., Path]


def pattern(shards: Path) -> str:
    return str(shards / "{00000..00001}.tar")


def skipped(contents: object) -> list[str]:
    return [r.reason for r in contents.records if r.fate == "skipped"]  # type: ignore[attr-defined]


def repack(path: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Write a tar again with members changed or left out."""
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]  # type: ignore[union-attr]
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            changed = change(name, data)
            if changed is not None:
                info = tarfile.TarInfo(name)
                info.size = len(changed)
                tar.addfile(info, io.BytesIO(changed))


def test_shards_give_every_sample_once_in_order(shards: Write) -> None:
    from lit_personalize.tinyworld.dataset import sample_pictures

    contents = read_shards(0, pattern(shards(8)), 256)
    names = [Path(s.name).name for s in contents.samples]
    assert names == [f"0000{n // 5}.tar:0000{n // 5}{n % 5:04d}" for n in range(8)]
    for sample, pixels in zip(contents.samples, sample_pictures(8, 7).pixels, strict=True):
        assert np.abs(sample.pixels.astype(int) - pixels).mean() < 4, "JPEG of the picture that was packed"
        assert sample.captions[0].isprintable() and " " in sample.captions[0]
    assert not skipped(contents)
    assert [r.reason for r in contents.records if r.path.endswith(".tar")] == ["5 samples", "3 samples"]


def test_missing_shard_is_named(shards: Write) -> None:
    with pytest.raises(DataError, match=r"00002\.tar.*1 of 3"):
        read_shards(0, str(shards() / "{00000..00002}.tar"), 256)


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.6, 0.9])
def test_truncated_shard_is_named_and_what_came_before_is_kept(shards: Write, kept: float) -> None:
    path = shards() / "00000.tar"
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: int((last.offset_data + last.size) * kept)])
    contents = read_shards(0, pattern(path.parent), 256)
    *incomplete, reason = skipped(contents)
    assert all("has no caption" in r for r in incomplete), "the sample in which the file ends may lack a member"
    whole = sum("00000.tar:" in s.name for s in contents.samples)
    assert "00000.tar is cut off" in reason
    assert whole < 5 and (whole > 0 or kept < 0.4)
    assert sum("00001.tar:" in s.name for s in contents.samples) == 3, "the next shard is read all the same"


def test_shard_cut_between_two_members_is_found(shards: Write) -> None:
    """tarfile reads such a file without an error."""
    path = shards() / "00000.tar"
    with tarfile.open(path) as tar:
        third = [m for m in tar.getmembers() if m.name.startswith("000000003")][0]
    path.write_bytes(path.read_bytes()[: third.offset])
    contents = read_shards(0, str(path), 256)
    assert [("00000.tar" in r, "end marker" in r) for r in skipped(contents)] == [(True, True)]
    assert len(contents.samples) == 3


def test_count_in_stats_must_match(shards: Write) -> None:
    folder = shards()
    (folder / "00000_stats.json").write_text('{"successes": 6}')
    [reason] = skipped(read_shards(0, pattern(folder), 256))
    assert "holds 5 samples" in reason and "00000_stats.json counts 6" in reason


@pytest.mark.parametrize(
    ("member", "data", "message"),
    [
        ("000000002.jpg", None, "sample .*00000.tar:000000002 has no picture"),
        ("000000002.txt", None, "sample .*00000.tar:000000002 has no caption"),
        ("000000002.jpg", b"not a picture", "sample .*00000.tar:000000002 is no jpg"),
        ("000000002.txt", b"caf\xe9", "caption of sample .*00000.tar:000000002 is not UTF-8"),
    ],
)
def test_damaged_sample_is_named(shards: Write, member: str, data: bytes | None, message: str) -> None:
    path = shards() / "00000.tar"
    repack(path, lambda name, old: data if name == member else old)
    contents = read_shards(0, str(path), 256)
    [reason] = skipped(contents)
    assert re.search(message, reason), reason
    assert len(contents.samples) == 4


def test_what_is_no_tar_is_named(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"<html>" * 500)
    [reason] = skipped(read_shards(0, str(tmp_path / "0.tar"), 256))
    assert "0.tar is a web page" in reason and "holds no sample" in reason


def test_folder_with_sidecars_and_prompt(folder: Write) -> None:
    path = folder("reg", 4, captions=True)
    (path / "00002.txt").unlink()
    contents = read_folder(1, path, "a thing", 256)
    assert contents.samples[2].captions == ("a thing",) and contents.samples[1].captions != ("a thing",)
    assert {s.concept for s in contents.samples} == {1}
    assert "00002.png has no caption 00002.txt" in skipped(read_folder(1, path, "", 256))[0]


def test_folder_with_line_aligned_lists(folder: Write) -> None:
    """The layout of published retrieval sets: `images.txt` and `caption.txt` beside the pictures."""
    path = folder("reg", 3)
    (path / "images").mkdir()
    for picture in path.glob("*.png"):
        picture.rename(path / "images" / picture.name)
    (path / "images.txt").write_text("".join(f"/elsewhere/reg/images/0000{i}.png\n" for i in (2, 0, 1)))
    (path / "caption.txt").write_text("two\nzero\none\n")
    contents = read_folder(0, path, "", 256)
    assert [(Path(s.name).name, s.captions[0]) for s in contents.samples] == [
        ("00002.png", "two"), ("00000.png", "zero"), ("00001.png", "one"),
    ]  # fmt: skip
    (path / "caption.txt").write_text("two\nzero\n")
    with pytest.raises(DataError, match="images.txt has 3 lines, caption.txt 2"):
        read_folder(0, path, "", 256)


class Painter:
    """Draws a flat picture whose colour is its seed; counts what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, captions: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        assert set(captions) == {"a toy"}
        self.asked += seeds
        return np.stack([np.full((8, 8, 3), seed, dtype=np.uint8) for seed in seeds])


def test_generated_set_is_drawn_once_by_seed(tmp_path: Path) -> None:
    options = Regularization(generate=20, prompt="a toy", cache=str(tmp_path), seed=5)
    painter = Painter()
    contents = read_set(0, options, 256, painter, "base")
    assert painter.asked == list(range(5, 25))
    assert [int(s.pixels[0, 0, 0]) for s in contents.samples] == list(range(5, 25))
    assert {s.captions for s in contents.samples} == {("a toy",)}
    assert len(read_set(0, options, 256, None, "base").samples) == 20, "no generator is needed any more"
    assert painter.asked == list(range(5, 25))
    read_set(0, options, 256, painter, "another base")
    assert len(painter.asked) == 40, "another base draws another set"


def test_another_resolution_or_sampler_is_another_set(base: Any, folder: Write, tmp_path: Path) -> None:
    concept = Concept(str(folder()), "cat", prompt="a cat")
    options = Regularization(generate=2, prompt="a toy", cache=str(tmp_path / "cache"))
    for resolution, identity in ((32, "25 steps"), (32, "25 steps"), (64, "25 steps"), (32, "50 steps")):
        data = PersonalizationData([concept], resolution, options)
        data.bind(base, base, Painter(), identity)
        data.prepare_data()
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"),
        ({"folder": "a", "generate": 3}, "exactly one"),
        ({"generate": 3}, "needs regularization.prompt"),
        ({"folder": "a", "per_batch": 0}, "per_batch"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(DataOptionError, match=message):
        Regularization(**options)  # type: ignore[arg-type]


def test_large_pictures_are_kept_small(tmp_path: Path) -> None:
    Image.new("RGB", (900, 700)).save(tmp_path / "a.png")
    [sample] = read_folder(0, tmp_path, "a", 100).samples
    assert sample.pixels.shape == (100, 129, 3) and sample.original == (700, 900)
