"""What one shard gave, and its file: the unit that tasks make and a merge takes."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lit_datamodules.errors import DataError
from lit_datamodules.tar_index import Member

BINS = 2000
"""Of the histograms of similarities over [-1, 1]: each is 0.001 wide."""
PICTURE = (("key", "string"), ("kind", "string"), ("offset", "int64"), ("bytes", "int64"), ("caption", "string"),
           ("meta", "string"))  # fmt: skip
"""Columns that say where a picture lies and what is said of it."""
CANDIDATE = (*PICTURE, ("query", "string"), ("similarity", "float64"))


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

    @classmethod
    def of(cls, shard: str, row: dict[str, Any], query: str, similarity: float) -> Candidate:
        """From a row with the columns `PICTURE`."""
        image = Member(row["offset"], row["bytes"])
        return cls(shard, row["key"], query, similarity, row["kind"], image, row["caption"], row["meta"])



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


def fields_of(meta: str) -> dict[str, Any] | None:
    """The fields of a sample's json; None if it is none."""
    try:
        found = json.loads(meta or "{}")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def write_part(part: Part, path: Path) -> None:
    """Write a part as one parquet file, all or nothing."""
    rows = [
        {"key": c.key, "kind": c.kind, "offset": c.image.offset, "bytes": c.image.size, "caption": c.caption,
         "meta": c.meta, "query": c.query, "similarity": c.similarity}
        for c in part.candidates
    ]  # fmt: skip
    write_table(rows, CANDIDATE, part, path)


def write_table(
    rows: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str]], part: Part, path: Path
) -> None:
    """Write rows, and beside them all of a part but its candidates, all or nothing."""
    about = {name: getattr(part, name) for name in ("shard", "size", "samples", "scanned", "faults", "histograms")}
    metadata = {b"litp": json.dumps(about | {"dropped": dict(part.dropped)}).encode()}
    table = pa.Table.from_pylist(rows, schema=pa.schema(columns, metadata))
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        pq.write_table(table, temporary, compression="zstd")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_table(path: Path) -> tuple[Part, pa.Table]:
    """Read what `write_table` wrote: a part without candidates, and the rows.

    Raises:
        DataError: The file is damaged; without it, its shard is read again.
    """
    try:
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[b"litp"])
        return Part(**{**about, "dropped": Counter(about["dropped"])}), table
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); remove it, and start the same command again") from error


def read_part(path: Path) -> Part:
    """Read what `write_part` wrote; see `read_table`."""
    part, table = read_table(path)
    part.candidates = [Candidate.of(part.shard, row, row["query"], row["similarity"]) for row in table.to_pylist()]
    return part
