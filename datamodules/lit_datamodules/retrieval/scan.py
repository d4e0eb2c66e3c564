"""One shard in, its best candidates per query out.

A shard is the unit of a scan: its captions are embedded in batches that never reach into the next one, so what it
gives depends on the shard and the plan alone, and not on which task of an array scans it, nor beside which others.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lit_datamodules.captions import decode_caption
from lit_datamodules.errors import DataError
from lit_datamodules.retrieval.plan import CaptionEncoder, Plan
from lit_datamodules.tar_index import CAPTION_KEYS, IMAGE_KEYS, Entry, Member, index_tar

BINS = 2000
"""Of the histograms of similarities over [-1, 1]: each is 0.001 wide."""
AHEAD = 4
"""Batches that are read and tokenized while one is embedded."""


@dataclass(frozen=True)
class Candidate:
    """A sample whose caption is among a shard's most similar ones for a query."""

    shard: str
    key: str
    query: str
    similarity: float
    kind: str
    """Extension of the picture."""
    image: Member
    caption: str
    meta: str
    """The sample's `json`, as text; "" if it has none."""

    @property
    def rank(self) -> tuple[float, str, str]:
        """Sort key of the one order that decides everything: most similar first, then by name."""
        return -self.similarity, self.shard, self.key


@dataclass
class Part:
    """What a shard gave."""

    shard: str
    size: int
    """Of the shard in bytes; a merge refuses one that changed."""
    samples: int = 0
    scanned: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    histograms: dict[str, list[int]] = field(default_factory=dict)
    candidates: list[Candidate] = field(default_factory=list)


@dataclass(frozen=True)
class _Captioned:
    entry: Entry
    caption: str
    meta: str


def scan_shard(path: Path, name: str, plan: Plan, encoder: CaptionEncoder, queries: np.ndarray) -> Part:
    """Embed the captions of a shard and keep the best of each query.

    Args:
        name: By which the shard is known in the result.
        queries: fp32 `[len(plan.queries), d]`, unit vectors in the encoder's space.

    Damaged places and samples without a caption or picture are named in `faults`.

    Raises:
        DataError: The file cannot be read at all, or the encoder gave vectors of another width.
    """
    try:
        index = index_tar(path)
        part = Part(name, path.stat().st_size, len(index.entries))
    except OSError as error:
        raise DataError(f"cannot read shard {path}: {error.strerror}") from error
    part.faults += [f"{name}{':' + fault.key if fault.key else ''} {fault.reason}" for fault in index.faults]
    rows: list[_Captioned] = []
    scores: list[np.ndarray] = []
    with path.open("rb") as file, ThreadPoolExecutor(1) as reader:
        fd = file.fileno()
        for group, tokens in _ahead(reader, _batches(index.entries, fd, plan, part), encoder):
            vectors = encoder.embed(tokens)
            if vectors.shape != (len(group), queries.shape[1]):
                raise DataError(f"the encoder gave {vectors.shape} for {len(group)} captions of {queries.shape[1]}")
            rows += group
            scores.append(vectors @ queries.T)
    part.scanned = len(rows)
    found = np.concatenate(scores) if scores else np.zeros((0, len(plan.queries)), np.float32)
    for column, query in enumerate(plan.queries):
        values = found[:, column].astype(np.float64)
        part.histograms[query.name] = np.histogram(values.clip(-1, 1), BINS, (-1, 1))[0].tolist()
        made = [_candidate(rows[i], name, query.name, values[i]) for i in _largest(values, plan.keep)]
        part.candidates += sorted(made, key=lambda c: c.rank)[: plan.keep]
    return part


def _largest(values: np.ndarray, keep: int) -> Sequence[int]:
    """Places of the `keep` largest values, and of all that equal the least of them."""
    if len(values) <= keep:
        return range(len(values))
    least = np.partition(values, len(values) - keep)[len(values) - keep]
    return np.flatnonzero(values >= least).tolist()


def _candidate(row: _Captioned, shard: str, query: str, similarity: float) -> Candidate:
    kind, image = row.entry.first(IMAGE_KEYS) or ("", Member(0, 0))
    return Candidate(shard, row.entry.key, query, float(similarity), kind, image, row.caption, row.meta)


def _batches(entries: Iterable[Entry], fd: int, plan: Plan, part: Part) -> Iterator[list[_Captioned]]:
    """Captions of the samples that pass the filters, in the shard's order."""
    group: list[_Captioned] = []
    for entry in entries:
        row = _captioned(entry, fd, part)
        if row is None:
            continue
        if plan.filters.asks and (reason := plan.filters.reason(_meta(row, part))):
            part.dropped[reason] += 1
            continue
        group.append(row)
        if len(group) == plan.batch_size:
            yield group
            group = []
    if group:
        yield group


def _captioned(entry: Entry, fd: int, part: Part) -> _Captioned | None:
    name = f"{part.shard}:{entry.key}"
    caption, json_ = entry.first(CAPTION_KEYS), entry.members.get("json")
    if entry.first(IMAGE_KEYS) is None:
        part.faults.append(f"{name} has no picture (jpg, png or webp)")
        return None
    if caption is None:
        part.faults.append(f"{name} has no caption (txt)")
        return None
    try:
        text = decode_caption(os.pread(fd, caption[1].size, caption[1].offset), f"caption of {name}")
    except DataError as error:
        part.faults.append(str(error))
        return None
    meta = os.pread(fd, json_.size, json_.offset).decode("utf-8", "replace") if json_ else ""
    return _Captioned(entry, text, meta)


def _meta(row: _Captioned, part: Part) -> dict[str, Any]:
    try:
        found = json.loads(row.meta or "{}")
    except ValueError:
        part.faults.append(f"{part.shard}:{row.entry.key} has a json that is none; its fields count as missing")
        return {}
    return found if isinstance(found, dict) else {}


def _ahead(
    reader: ThreadPoolExecutor, groups: Iterator[list[_Captioned]], encoder: CaptionEncoder
) -> Iterator[tuple[list[_Captioned], Any]]:
    """Read and tokenize in another thread, a few batches before they are asked for."""

    def work() -> tuple[list[_Captioned], Any] | None:
        group = next(groups, None)
        return None if group is None else (group, encoder.tokenize([row.caption for row in group]))

    waiting: list[Future[tuple[list[_Captioned], Any] | None]] = [reader.submit(work) for _ in range(AHEAD)]
    while (found := waiting.pop(0).result()) is not None:
        waiting.append(reader.submit(work))
        yield found


# ---- files ----------------------------------------------------------------------------------------------


def write_part(part: Part, path: Path) -> None:
    """Write a part as one parquet file, all or nothing."""
    rows = [
        {"key": c.key, "query": c.query, "similarity": c.similarity, "kind": c.kind, "offset": c.image.offset,
         "bytes": c.image.size, "caption": c.caption, "meta": c.meta}
        for c in part.candidates
    ]  # fmt: skip
    about = {name: getattr(part, name) for name in ("shard", "size", "samples", "scanned", "faults", "histograms")}
    metadata = {b"litp": json.dumps(about | {"dropped": dict(part.dropped)}).encode()}
    table = pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata(metadata))
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        pq.write_table(table, temporary, compression="zstd")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


SCHEMA = pa.schema([
    ("key", pa.string()), ("query", pa.string()), ("similarity", pa.float64()), ("kind", pa.string()),
    ("offset", pa.int64()), ("bytes", pa.int64()), ("caption", pa.string()), ("meta", pa.string()),
])  # fmt: skip


def read_part(path: Path) -> Part:
    """Read what `write_part` wrote.

    Raises:
        DataError: The file is damaged; without it, its shard is scanned again.
    """
    try:
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[b"litp"])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); remove it, and scan again") from error
    part = Part(**{**about, "dropped": Counter(about["dropped"])})
    for row in table.to_pylist():
        member = Member(row["offset"], row["bytes"])
        found = (row["key"], row["query"], row["similarity"], row["kind"], member, row["caption"], row["meta"])
        part.candidates.append(Candidate(part.shard, *found))
    return part
