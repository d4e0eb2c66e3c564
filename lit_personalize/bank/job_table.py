"""The job table of a bank: one row for each adapter, as `jobs.parquet`. Needs no torch.

It is written whole and only grows: rows that are there stay as they are, so what is trained remains what was planned.
What happens to the rows is not written here; see `claims`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lit_personalize import atomic
from lit_personalize.errors import DataError, UsageError

FILE = "jobs.parquet"
ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
NUMBERS = {"seed": int, "steps": int, "lr": float, "weight_decay": float, "clip": float}
"""Columns that a row may have for itself, instead of what the configuration says for all."""
WORDS = ("class_noun", "token", "prompt")
Label = str | float


@dataclass(frozen=True)
class Row:
    """One adapter to train.

    Args:
        id: Names it, and its folder.
        folder: Of its pictures, with their captions; or
        files: its pictures one by one; or
        shard: a tar whose members hold them, and
        members: name, first byte and size of each of them.
        class_noun, token, prompt: Its own, where given.
        seed, steps, lr, weight_decay, clip: Likewise.
        labels: Carried along, and noted with the finished adapter.
    """

    id: str
    folder: str = ""
    files: list[str] = field(default_factory=list)
    shard: str = ""
    members: list[tuple[str, int, int]] = field(default_factory=list)
    class_noun: str | None = None
    token: str | None = None
    prompt: str | None = None
    seed: int | None = None
    steps: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    clip: float | None = None
    labels: dict[str, Label] = field(default_factory=dict)


def is_id(text: str) -> bool:
    """Whether a text can name an adapter and its folder."""
    return ID.fullmatch(text) is not None


def read(folder: Path) -> list[Row]:
    """The rows of a planned bank, in their order.

    Raises:
        DataError: There is no table, or it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / FILE
    try:
        table = pq.read_table(path, partitioning=None, page_checksum_verification=True)
        labels = [name.decode() for name in table.schema.metadata[b"labels"].split(b"\0") if name]
        return [_row(values, labels) for values in table.to_pylist()]
    except FileNotFoundError as error:
        raise DataError(f"{folder} has no {FILE}: litp bank plan PEOPLE --out {folder} makes it") from error
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is damaged ({error}): plan the bank again after removing it; what is trained stays"
        ) from error


def write(folder: Path, rows: Sequence[Row]) -> int:
    """Write the table, or let it grow.

    Returns:
        How many rows are new.

    Raises:
        UsageError: An adapter of the table is not among the rows, or is another one now.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    before = {row.id: row for row in read(folder)} if (folder / FILE).exists() else {}
    now = {row.id: row for row in rows}
    if changed := [name for name, row in before.items() if now.get(name) != row]:
        name = changed[0]
        how = "is not among them" if name not in now else f"has another {_difference(before[name], now[name])}"
        raise UsageError(
            f"{folder} was planned with other adapters: {name} {how} ({len(changed)} of {len(before)}); a table only "
            "grows, so use another --out"
        )
    if len(now) == len(before) > 0:
        return 0
    ordered = [*before.values(), *(row for name, row in now.items() if name not in before)]
    labels = list(dict.fromkeys(label for row in ordered for label in row.labels))
    plain = [{k: v for k, v in asdict(row).items() if k != "labels"} for row in ordered]
    columns: dict[str, Any] = {
        kind.name: pa.array([values[kind.name] for values in plain], type=kind.type) for kind in _schema()
    }
    for label in labels:
        values = [row.labels.get(label) for row in ordered]
        if len({type(value) for value in values} - {type(None)}) > 1:
            values = [value if value is None else str(value) for value in values]
        columns[f"label.{label}"] = pa.array(values)
    table = pa.table(columns).replace_schema_metadata({"labels": "\0".join(labels)})
    with atomic.replacing(folder / FILE) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)
    return len(ordered) - len(before)


def labels_of(texts: Sequence[Mapping[str, str]]) -> list[dict[str, Label]]:
    """Labels of rows as a table of text has them: a column whose every value is a number holds numbers."""
    names = list(dict.fromkeys(name for row in texts for name in row))
    numeric = {name for name in names if all(_is_number(row[name]) for row in texts if row.get(name))}
    return [
        {name: float(text) if name in numeric else text for name, text in row.items() if text != ""} for row in texts
    ]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _difference(before: Row, now: Row) -> str:
    a, b = asdict(before), asdict(now)
    return ", ".join(name for name in a if a[name] != b[name])


def _row(values: Mapping[str, Any], labels: Sequence[str]) -> Row:
    own = {name: value for name, value in values.items() if not name.startswith("label.")}
    own["members"] = [(str(m["name"]), int(m["offset"]), int(m["size"])) for m in own["members"]]
    found = {name: values[f"label.{name}"] for name in labels}
    return Row(**own, labels={name: value for name, value in found.items() if value is not None})


def _schema() -> Any:
    import pyarrow as pa

    member = pa.struct([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
    texts = [(name, pa.string()) for name in WORDS]
    numbers = [(name, pa.int64() if kind is int else pa.float64()) for name, kind in NUMBERS.items()]
    fields = [("id", pa.string()), ("folder", pa.string()), ("files", pa.list_(pa.string())), ("shard", pa.string()),
              ("members", pa.list_(member)), *texts, *numbers]  # fmt: skip
    return pa.schema(fields)
