"""A corpus's index: one line per row, in the order of the rows, as a parquet file that any data tool opens.

It is written whole and renamed, and names the shards (in its schema's metadata): a row is in the corpus from the moment
at which the index that has it takes its place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lit_personalize import atomic
from lit_personalize.corpus.shards import shard_name
from lit_personalize.errors import DataError

INDEX = "index.parquet"
LABEL = "label."
"""Begins the columns of labels."""
COLUMNS = {
    "id": pa.string(),
    "shard": pa.int32(),
    "row": pa.int32(),
    "checksum": pa.string(),
    "error": pa.float32(),  # relative, of the row as it is stored
    "seed": pa.int64(),
    "init_seed": pa.int64(),
    "loss": pa.float64(),
    "steps": pa.int64(),
    "base_fingerprint": pa.string(),
    "recipe": pa.string(),
    "details": pa.string(),  # whatever else was known of the adapter, as JSON
}
SHARDS = b"litp.shards"


def empty_index() -> pa.Table:
    return _with_shards(pa.table({name: pa.array([], kind) for name, kind in COLUMNS.items()}), [])


def read_index(path: Path) -> pa.Table:
    """Raises:
    DataError: It is missing or damaged.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing: restore it, or pack the adapters again (litp bank pack)")
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        shards = shards_of(table)
        names = [shard["file"] for shard in shards]
        if names != [shard_name(number) for number in range(len(shards))]:
            raise ValueError(f"it names shards {names}")
        if sum(shard["rows"] for shard in shards) != table.num_rows or not set(COLUMNS) <= set(table.column_names):
            raise ValueError("its lines are not those of its shards")
        return table
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path} is damaged ({reason}): restore it, or pack the adapters again") from error


def write_index(path: Path, table: pa.Table) -> None:
    """Whole, or not at all."""
    sink = BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    atomic.write_bytes(path, sink.getvalue())


def shards_of(table: pa.Table) -> list[dict[str, Any]]:
    """The shards that an index names: file, rows, sha256."""
    shards: list[dict[str, Any]] = json.loads((table.schema.metadata or {})[SHARDS])
    return shards


def extended(table: pa.Table, records: Sequence[Mapping[str, Any]], shard: Mapping[str, Any]) -> pa.Table:
    """An index with the records of one more shard; labels stand in their own columns."""
    columns: dict[str, list[Any]] = {name: [record.get(name) for record in records] for name in COLUMNS}
    labels = dict.fromkeys(name for record in records for name in record.get("labels") or {})
    columns |= {f"{LABEL}{name}": [(r.get("labels") or {}).get(name) for r in records] for name in labels}
    added = pa.table({name: _column(name, values) for name, values in columns.items()})
    return _with_shards(_joined(table, added), [*shards_of(table), dict(shard)])


def relabelled(table: pa.Table, labels: Mapping[str, Mapping[str, Any]]) -> pa.Table:
    """An index with labels by id set; those that are not named stay."""
    ids = table["id"].to_pylist()
    for name in dict.fromkeys(name for own in labels.values() for name in own):
        column = f"{LABEL}{name}"
        before = table[column].to_pylist() if column in table.column_names else [None] * len(ids)
        values = [labels[i].get(name, old) if i in labels else old for i, old in zip(ids, before, strict=True)]
        array = _column(column, values)
        place = table.schema.get_field_index(column)
        table = table.append_column(column, array) if place < 0 else table.set_column(place, column, array)
    return table


def _column(name: str, values: list[Any]) -> pa.Array:
    if name in COLUMNS:
        return pa.array(values, COLUMNS[name])
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {bool}:
        return pa.array(values, pa.bool_())
    if kinds <= {bool, int, float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    return pa.array([None if value is None else str(value) for value in values], pa.string())


def _joined(table: pa.Table, added: pa.Table) -> pa.Table:
    """Both tables below one another; a label that is a number in one and text in the other becomes text."""
    for name in [n for n in added.column_names if n in table.column_names]:
        one, two = table.schema.field(name).type, added.schema.field(name).type
        if one != two and name.startswith(LABEL):
            both = _column(name, [*table[name].to_pylist(), *added[name].to_pylist()])
            table = table.set_column(table.schema.get_field_index(name), name, both[: len(table)])
            added = added.set_column(added.schema.get_field_index(name), name, both[len(table) :])
    return pa.concat_tables([table, added], promote_options="default").combine_chunks()


def _with_shards(table: pa.Table, shards: Sequence[Mapping[str, Any]]) -> pa.Table:
    return table.replace_schema_metadata({SHARDS: json.dumps(list(shards))})
