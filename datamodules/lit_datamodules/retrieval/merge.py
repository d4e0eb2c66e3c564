"""From the parts of all shards to one regularization set: the best pictures per query, each once, with their story.

Candidates are looked at in one order (most similar first, then by shard and key), so that the set is the same however
the shards were split over tasks. Pictures are read only here, and only as many as are needed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lit_datamodules.errors import DataError, DataOptionError
from lit_datamodules.image_files import decode_image
from lit_datamodules.manifest import sha256_of
from lit_datamodules.retrieval.parts import BINS, Candidate, Part, fields_of
from lit_datamodules.retrieval.plan import Plan
from lit_datamodules.shard_access import MemberReader, versions_of
from lit_datamodules.shard_paths import Shard
from lit_datamodules.shard_writer import write_json, write_shards


@dataclass(frozen=True)
class Selection:
    """How many candidates become pictures.

    Args:
        n: Pictures per query.
        min_similarity: Least cosine; None asks for none. It depends on the encoder and on the kind of query.
        percentile: Instead of a cosine, the share of all scanned captions in percent that must lie below.
        near_duplicates: Bits of 64 in which the perceptual hashes of two pictures of a query must differ; 0 keeps all.
    """

    n: int = 200
    min_similarity: float | None = None
    percentile: float | None = None
    near_duplicates: int = 4

    def __post_init__(self) -> None:
        if self.n < 1:
            raise DataOptionError(f"n must be at least 1, not {self.n}")
        if self.min_similarity is not None and self.percentile is not None:
            raise DataOptionError("min_similarity and percentile say the same thing in two ways; give one")
        if self.min_similarity is not None and not -1 <= self.min_similarity <= 1:
            raise DataOptionError(f"min_similarity is a cosine in [-1, 1], not {self.min_similarity}")
        if self.percentile is not None and not 0 <= self.percentile <= 100:
            raise DataOptionError(f"percentile lies between 0 and 100, not {self.percentile}")
        if not 0 <= self.near_duplicates <= 64:
            raise DataOptionError(f"near_duplicates is a number of bits from 0 to 64, not {self.near_duplicates}")


@dataclass
class Chosen:
    """A picture of the set."""

    candidate: Candidate
    data: bytes
    width: int
    height: int
    hash: int
    similarities: dict[str, float] = field(default_factory=dict)
    """By the name of each query that chose it."""


@dataclass
class Pool:
    """The best candidates of a query over all parts, and what a query got of them."""

    candidates: list[Candidate] = field(default_factory=list)
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    floor: float = -2.0
    """Similarity below which candidates may be missing, because a part or the pool was full."""
    threshold: float = -1.0
    rejected: Counter[str] = field(default_factory=Counter)
    similarities: list[float] = field(default_factory=list)

    def add(self, histogram: Sequence[int], found: list[Candidate], keep: int) -> None:
        """Take what a part found for the query, in its order; the pool holds ten times as many as one part."""
        self.histogram += np.array(histogram)
        if len(found) >= keep:
            self.floor = max(self.floor, found[-1].similarity)
        self.candidates = sorted(self.candidates + found, key=lambda c: c.rank)
        if len(self.candidates) > 10 * keep:
            self.floor = max(self.floor, self.candidates[10 * keep].similarity)
            del self.candidates[10 * keep :]

    def set_threshold(self, selection: Selection) -> None:
        """The least similarity that is asked for; a percentile is read from the histogram, to 0.001."""
        if selection.percentile is None:
            self.threshold = -1.0 if selection.min_similarity is None else selection.min_similarity
            return
        below = np.cumsum(self.histogram) / max(1, self.histogram.sum())
        self.threshold = float(-1 + 2 * (int(np.searchsorted(below, selection.percentile / 100)) + 1) / BINS)

    def complete(self, n: int) -> bool:
        """Whether no candidate that the parts left out could belong to the set."""
        last = self.similarities[-1] if len(self.similarities) == n else self.threshold
        return last >= self.floor


def merge(
    parts: Iterable[Part],
    shards: Mapping[str, Shard],
    plan: Plan,
    selection: Selection,
    out: Path,
    per_shard: int = 1000,
) -> dict[str, Any]:
    """Choose, pack, and report.

    Args:
        parts: Of all shards, in any order; read one after the other.
        shards: Every shard that has a part, by its name.
        out: Folder that gets `00000.tar`..., `shards.json` and `retrieval.json`.

    Returns:
        What `retrieval.json` says.

    Raises:
        DataError: A shard changed since it was scanned, or no query found a picture.
    """
    pools = {query.name: Pool() for query in plan.queries}
    scanned: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    faults: list[str] = []
    versions = versions_of(shards)
    for part in parts:
        if versions[part.shard] != part.version:
            raise DataError(f"shard {shards[part.shard]} changed since it was scanned; scan it again, then merge")
        scanned.update({"shards": 1, "samples": part.samples, "captions": part.scanned})
        dropped += part.dropped
        faults += part.faults
        found: dict[str, list[Candidate]] = {name: [] for name in pools}
        for candidate in part.candidates:
            found[candidate.query].append(candidate)
        for name, pool in pools.items():
            pool.add(part.histograms[name], found[name], plan.keep)
    pictures: dict[tuple[str, str], Chosen | str] = {}
    chosen: dict[tuple[str, str], Chosen] = {}
    with MemberReader({shards[name]: version for name, version in versions.items()}) as reader:
        for name, pool in pools.items():
            pool.set_threshold(selection)
            for picture in _choose(pool, shards, reader, plan, selection, pictures):
                where = (picture.candidate.shard, picture.candidate.key)
                chosen.setdefault(where, picture).similarities[name] = pool.similarities[-1]
    if not chosen:
        best = ", ".join(f"{name}: {p.candidates[0].similarity:.3f}" for name, p in pools.items() if p.candidates)
        raise DataError(f"no picture passes; the most similar caption per query: {best or 'none at all'}")
    report = {
        "format": 1, "plan": plan.to_dict(), "selection": asdict(selection), "pictures": len(chosen),
        "queries": {name: _told(pool, selection) for name, pool in pools.items()},
        "scanned": {**scanned, "dropped": dict(sorted(dropped.items()))}, "faults": sorted(faults),
        "shards": write_shards((_sample(picture) for picture in chosen.values()), out, per_shard),
    }  # fmt: skip
    write_json(report, out / "retrieval.json")
    return report


def _told(pool: Pool, selection: Selection) -> dict[str, Any]:
    values = pool.similarities
    spread = {"min": min(values), "mean": float(np.mean(values)), "max": max(values)} if values else None
    return {
        "kept": len(values), "threshold": pool.threshold, "similarity": spread, "rejected": dict(pool.rejected),
        "complete": pool.complete(selection.n),
    }  # fmt: skip


def _choose(
    pool: Pool, shards: Mapping[str, Shard], reader: MemberReader, plan: Plan, selection: Selection,
    pictures: dict[tuple[str, str], Chosen | str],
) -> Iterator[Chosen]:  # fmt: skip
    hashes: list[int] = []
    for candidate in pool.candidates:
        if len(hashes) == selection.n or candidate.similarity < pool.threshold:
            return
        where = (candidate.shard, candidate.key)
        if where not in pictures:
            pictures[where] = _open(candidate, shards[candidate.shard], reader, plan.filters.min_side or 1)
        picture = pictures[where]
        if isinstance(picture, str):
            pool.rejected[picture] += 1
        elif any((picture.hash ^ other).bit_count() < selection.near_duplicates for other in hashes):
            pool.rejected["near-duplicate"] += 1
        else:
            hashes.append(picture.hash)
            pool.similarities.append(candidate.similarity)
            yield picture


def _open(candidate: Candidate, shard: Shard, reader: MemberReader, min_side: int) -> Chosen | str:
    """The picture, or why it cannot be used."""
    data = reader.read(shard, candidate.image)
    try:
        picture = decode_image(data, f"{shard}:{candidate.key}")
    except DataError:
        return "damaged picture"
    height, width = picture.size
    if min(height, width) < min_side:
        return f"side below {min_side}"
    return Chosen(candidate, data, width, height, perceptual_hash(picture.pixels))


def perceptual_hash(pixels: np.ndarray) -> int:
    """64 bits that survive resizing and compression: signs of the 8 x 8 lowest DCT terms against their median.

    Args:
        pixels: uint8 `[H, W, 3]`.
    """
    small = Image.fromarray(pixels).convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    terms = DCT @ np.asarray(small, np.float64) @ DCT.T
    bits = (terms > np.median(terms)).flatten()
    return int("".join("1" if bit else "0" for bit in bits), 2)


DCT = np.cos(np.pi * np.arange(8)[:, None] * (2 * np.arange(32)[None] + 1) / 64)
"""The first eight rows of the cosine transform of 32 values."""


def _sample(picture: Chosen) -> dict[str, bytes]:
    candidate = picture.candidate
    about = {
        **(fields_of(candidate.meta) or {}),
        "concepts": list(picture.similarities), "similarity": picture.similarities,
        "source": {"shard": candidate.shard, "key": candidate.key},
        "width": picture.width, "height": picture.height,
        "file_sha256": sha256_of(picture.data), "phash": f"{picture.hash:016x}",
    }  # fmt: skip
    return {
        candidate.kind: picture.data,
        "txt": candidate.caption.encode(),
        "json": json.dumps(about, ensure_ascii=False).encode(),
    }
