"""Labels of adapters, from a table with a line for each."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lit_personalize.errors import DataError

WORDS = {"true": True, "yes": True, "false": False, "no": False}
NOTHING = ("", "nan", "none", "null", "na")


def read_labels(path: Path) -> dict[str, dict[str, Any]]:
    """Labels by adapter: numbers, yes/no, or words; a cell that says nothing is left out.

    Args:
        path: csv or parquet. The column `id` names the adapter, or the first where there is none.

    Raises:
        DataError: It cannot be read, or an id stands twice.
    """
    if not path.is_file():
        raise DataError(f"labels {path} do not exist: name a csv or parquet file")
    try:
        if path.suffix == ".parquet":
            lines = pq.read_table(path).to_pylist()
        else:
            with path.open(encoding="utf-8-sig", newline="") as file:
                lines = list(csv.DictReader(file, strict=True))
    except (pa.ArrowException, csv.Error, UnicodeDecodeError, OSError) as error:
        raise DataError(f"labels {path} cannot be read ({error}): write them as csv or parquet") from error
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=2):
        if None in line or None in line.values() and path.suffix != ".parquet":
            raise DataError(f"labels {path}: line {number} has another number of cells than the first line")
        key = "id" if "id" in line else next(iter(line))
        name = str(line.pop(key))
        if name in found:
            raise DataError(f"labels {path}: adapter {name!r} stands twice: leave one line")
        found[name] = {column: value for column, cell in line.items() if (value := _value(cell)) is not None}
    if not found:
        raise DataError(f"labels {path} have no line: the first one names columns, each other one is an adapter's")
    return found


def _value(cell: Any) -> Any:
    if isinstance(cell, str):
        word = cell.strip().lower()
        if word in NOTHING:
            return None
        if word in WORDS:
            return WORDS[word]
        try:
            cell = float(word)
        except ValueError:
            return cell.strip()
    if isinstance(cell, float) and not math.isfinite(cell):
        return None
    return cell if isinstance(cell, bool | int | float) or cell is None else str(cell)
