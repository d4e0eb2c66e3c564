"""What one shard gave, and its file: the unit that tasks make and a merge takes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from lit_datamodules.errors import DataError
from lit_datamodules.shard_access import versions_of
from lit_datamodules.shard_paths import Shard
from lit_datamodules.tar_index import Member

log = logging.getLogger(__name__)

LONGEST = 200
"""Characters of a file's name; file systems allow 255."""
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
    version: str
    """Of the shard, see `shard_access.version_of`: what is made of another one under its name does not count."""
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
    except (ValueError, RecursionError):
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


def write_table(rows: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str]], part: Part, path: Path) -> None:
    """Write rows, and beside them all of a part but its candidates, all or nothing."""
    about = {name: getattr(part, name) for name in ("shard", "version", "samples", "scanned", "faults", "histograms")}
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


def file_name(shard: str, ending: str) -> str:
    """Of what is made of a shard; long names (commands may be) are cut, and told apart by a hash."""
    name = quote(shard, safe="")
    if len(name) > LONGEST:
        name = f"{name[:LONGEST]}-{hashlib.sha256(shard.encode()).hexdigest()[:16]}"
    return f"{name}{ending}"


def outdated(shards: Mapping[str, Shard], places: Mapping[str, Path]) -> list[str]:
    """Shards of which nothing whole has been made yet, or of another version than they have now.

    Args:
        places: What is made of each shard, written by `write_table`.
    """
    made = {name: version for name in shards if (version := _version_in(places[name])) is not None}
    now = versions_of({name: shards[name] for name in made})
    for name, version in made.items():
        if version != now[name]:
            log.warning("%s is damaged, or of another %s than the one that is there now", places[name], name)
    return [name for name in shards if name not in made or made[name] != now[name]]


def _version_in(path: Path) -> str | None:
    """The version of the shard that a file was made of; "" if it is damaged, None if there is none."""
    try:
        return str(json.loads(pq.read_schema(path).metadata[b"litp"])["version"])
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return ""


def read_part(path: Path) -> Part:
    """Read what `write_part` wrote; see `read_table`."""
    part, table = read_table(path)
    part.candidates = [Candidate.of(part.shard, row, row["query"], row["similarity"]) for row in table.to_pylist()]
    return part
