"""A shard's index finds every sample that damage did not touch, and says where it did."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_datamodules.shard_sets import read_shards
from lit_datamodules.shard_writer import MANIFEST, difference, write_shards
from lit_datamodules.tar_index import index_tar, read_member, split_name

SAMPLES = 12
Files = dict[str, bytes]


def samples_of(count: int = SAMPLES) -> list[Files]:
    """Pictures of uneven sizes, most of them more than a block long, and metadata that may be no json."""
    rng = np.random.default_rng(3)
    found = []
    for i in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (9, 5 + 6 * i, 3), np.uint8)).save(buffer, "PNG")
        found.append({"png": buffer.getvalue(), "txt": f"sample {i}".encode(), "json": rng.bytes(5 + 100 * i)})
    return found


def read(path: Path) -> dict[str, Files]:
    return {e.key: {kind: read_member(path, m) for kind, m in e.members.items()} for e in index_tar(path).entries}


@dataclass(frozen=True)
class Damage:
    """The bytes of a damaged shard, and the places from `first` to `last` that were touched in the whole one."""

    data: bytes
    first: int
    last: int


def damaged(data: bytes, rng: np.random.Generator) -> Damage:
    """Bytes flipped, zeroed, lost, added, or the end cut off."""
    at, length = int(rng.integers(len(data) - 1)), int(rng.integers(1, 3000))
    match int(rng.integers(5)):
        case 0:
            flipped = bytearray(data)
            places = [min(len(data) - 1, at + int(k)) for k in rng.integers(0, 600, int(rng.integers(1, 5)))]
            for place in places:
                flipped[place] ^= 1 << int(rng.integers(8))
            return Damage(bytes(flipped), min(places), max(places) + 1)
        case 1:
            return Damage(data[:at] + bytes(len(data[at : at + length])) + data[at + length :], at, at + length)
        case 2:
            return Damage(data[:at] + data[at + length :], at, at + length)
        case 3:
            return Damage(data[:at] + rng.bytes(length) + data[at:], at, at + 1)
        case _:
            return Damage(data[:at], at, len(data))


def test_a_thousand_damaged_shards_lose_nothing_silently(tmp_path: Path) -> None:
    """Never an exception; samples that damage did not touch are found whole; every other loss is told."""
    samples = samples_of()
    write_shards(samples, tmp_path)
    path = tmp_path / "00000.tar"
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = {m.name: (m.offset, m.offset_data + -(-m.size // 512) * 512) for m in tar.getmembers()}
    spans = {f"{i:09d}": [span for name, span in ends.items() if name.startswith(f"{i:09d}")] for i in range(SAMPLES)}
    recovered = 0
    for seed in range(1000):
        damage = damaged(data, np.random.default_rng(seed))
        path.write_bytes(damage.data)
        index, found = index_tar(path), read(path)
        for (key, of), files in zip(spans.items(), samples, strict=True):
            touched = any(start < damage.last and damage.first < end for start, end in of)
            if not touched:
                assert found.get(key) == files, f"seed {seed}: {key} was not touched, but is lost"
                recovered += damage.first < of[0][0]
            elif found.get(key) != files:
                short = key not in found or set(found[key]) < set(files)
                assert not short or index.faults or set(found.get(key, {})), f"seed {seed}: {key} went silently"
        assert damage.data == data or difference(path), f"seed {seed}: the manifest does not tell"
        told = [record.fate for record in read_shards(0, str(path), 64).records]
        assert "skipped" in told or damage.data == data
    assert recovered > 1000, "reading goes on behind damage"


def test_long_names_and_folders_keep_their_keys(tmp_path: Path) -> None:
    """Extended headers of both kinds, and keys with dots in their folders."""
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = tmp_path / f"{kind}.tar"
        names = ["v1.5/" + "ü" * 150, "short", "y" * 99]
        with tarfile.open(path, "w", format=kind) as tar:
            for name in names:
                for suffix in ("jpg", "TXT"):
                    info = tarfile.TarInfo(f"{name}.{suffix}")
                    info.size = 4
                    tar.addfile(info, io.BytesIO(suffix.encode().ljust(4)))
        index = index_tar(path)
        assert not index.faults and [e.key for e in index.entries] == names
        assert all(list(e.members) == ["jpg", "txt"] for e in index.entries)
    assert split_name("a.b/c.d.jpg") == ("a.b/c", "d.jpg") and split_name("folder/") == ("", "")


def test_two_samples_of_one_key_are_told(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.jpg", "a.txt", "b.jpg", "a.jpg", "b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    index = index_tar(path)
    assert [e.key for e in index.entries] == ["a", "b"]
    assert [(f.key, "came before" in f.reason) for f in index.faults] == [("a", True), ("b", True)]


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"", "is empty: 0 bytes"), (b"  <!DOCTYPE html><p>502", "is a web page"), (b"\x1f\x8b\x08" * 300, "gunzip")],
)
def test_what_is_no_tar_is_said(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "0.tar").write_bytes(data)
    index = index_tar(tmp_path / "0.tar")
    assert not index.entries and [said in fault.reason for fault in index.faults] == [True]


def test_the_same_samples_make_the_same_bytes(tmp_path: Path) -> None:
    first = write_shards(samples_of(), tmp_path / "a", per_shard=5)
    assert first == write_shards(samples_of(), tmp_path / "b", per_shard=5)
    assert [shard["samples"] for shard in first.values()] == [5, 5, 2] and list(first)[2] == "00002.tar"
    for name in (*first, MANIFEST):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted([*first, MANIFEST])
    again = {key: files for name in first for key, files in read(tmp_path / "a" / name).items()}
    assert list(again) == [f"{i // 5:05d}{i % 5:04d}" for i in range(SAMPLES)]
    assert list(again.values()) == samples_of()
