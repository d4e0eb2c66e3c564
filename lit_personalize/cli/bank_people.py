"""What `litp bank` reads its adapters from: a folder of folders, a csv, or tar shards."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_personalize.bank.job_table import NUMBERS, WORDS, Row, is_id, labels_of
from lit_personalize.errors import DataError

SHOWN = 5
"""Faults that a message names."""
PICTURES = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Found:
    """Rows, and why others are not among them."""

    rows: list[Row]
    left_out: list[str]


def rows_of(source: str, tolerate: int = 0) -> Found:
    """Read a folder, a `.csv` or the shards that a pattern names.

    Args:
        tolerate: Rows that may be left out because they cannot be trained: pictures are missing, or a line is damaged.

    Raises:
        DataError: There is nothing, an id stands twice, or more than `tolerate` rows are of no use; names them.
    """
    found: list[Row | str]
    if source.endswith(".csv"):
        found = list(_of_csv(Path(source)))
    elif ".tar" in source:
        found = list(_of_shards(source))
    else:
        found = list(_of_folder(Path(source)))
    rows = [row for row in found if isinstance(row, Row)]
    faults = [row for row in found if isinstance(row, str)]
    if twice := sorted(name for name, count in Counter(row.id for row in rows).items() if count > 1):
        raise DataError(f"{source}: {_some(twice)} stand more than once; every adapter has an id of its own")
    if len(faults) > tolerate:
        budget = f" (--tolerate {tolerate})" if tolerate else ""
        raise DataError(
            f"{source}: {len(faults)} of {len(found)} adapters cannot be trained{budget}: {_some(faults, '; ')}. "
            f"Mend them, or leave them out by --tolerate {len(faults)}"
        )
    if not rows:
        raise DataError(f"{source} holds no adapter to train")
    return Found(rows, faults)


def _some(names: list[str], between: str = ", ") -> str:
    more = f"{between}and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return between.join(names[:SHOWN]) + more


# ---- folders --------------------------------------------------------------------------------------


def _of_folder(folder: Path) -> Iterator[Row | str]:
    inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")) if folder.is_dir() else []
    if not inside:
        raise DataError(
            f"{folder} holds no folder of pictures: give a folder with one for each adapter, a .csv or shards"
        )
    for place in inside:
        row = Row(place.name, folder=str(place.absolute()))
        yield _fault(row.id) or _missing(row) or row


def _fault(name: str) -> str:
    return "" if is_id(name) else f"{name!r} cannot name an adapter: use letters, digits, '_', '-' and '.'"


def _missing(row: Row) -> str:
    """Why the pictures of a row are not there; "" if they are."""
    from lit_datamodules.errors import DataError as NoPictures
    from lit_datamodules.image_files import list_images

    if row.folder:
        try:
            list_images(Path(row.folder))
        except NoPictures as error:
            return f"{row.id}: {error}"
    if gone := [name for name in row.files if not Path(name).is_file()]:
        return f"{row.id}: there is no picture {_some(gone)}"
    return ""


# ---- tables ---------------------------------------------------------------------------------------


def _of_csv(path: Path) -> Iterator[Row | str]:
    """Columns id, images, class_noun, token, prompt, seed, steps, lr, weight_decay, clip; all others are labels."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"line {line} of {path} is not UTF-8: save the table as UTF-8") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = list(reader.fieldnames or [])
    if lacking := {"id", "images"} - set(columns):
        raise DataError(f"{path} lacks the column {' and '.join(sorted(lacking))}; its first line names the columns")
    if twice := sorted({name for name in columns if columns.count(name) > 1 or not name}):
        raise DataError(f"{path}: the columns {_some(twice)} stand more than once, or have no name")
    known = {"id", "images", *WORDS, *NUMBERS}
    lines = [(reader.line_num, values) for values in reader]
    whole = [(line, values) for line, values in lines if None not in values and None not in values.values()]
    labels = iter(labels_of([{k: v for k, v in values.items() if k not in known} for _, values in whole]))
    for line, values in lines:
        if None in values or None in values.values():
            count = "more" if None in values else "fewer"
            yield f"line {line} has {count} values than the first has columns"
            continue
        row = _row(path, line, values, next(labels))
        yield row if isinstance(row, str) else (_missing(row) or row)


def _row(path: Path, line: int, values: dict[str, str], labels: Any) -> Row | str:
    name = values["id"].strip()
    if why := _fault(name):
        return f"line {line}: {why}"
    numbers: dict[str, Any] = {}
    for column, kind in NUMBERS.items():
        text = (values.get(column) or "").strip()
        try:
            numbers[column] = kind(text) if text else None
        except ValueError:
            return f"line {line}: {column} of {name} is {text!r}, which is no {'whole ' * (kind is int)}number"
    if numbers["steps"] is not None and numbers["steps"] < 1:
        return f"line {line}: steps of {name} must be at least 1, not {numbers['steps']}"
    words: dict[str, Any] = {column: values.get(column) or None for column in WORDS}
    places = [str((path.parent / part.strip()).absolute()) for part in values["images"].split(";") if part.strip()]
    if not places:
        return f"line {line}: {name} has no images"
    one = len(places) == 1 and Path(places[0]).suffix.lower().lstrip(".") not in PICTURES
    where: dict[str, Any] = {"folder": places[0]} if one else {"files": places}
    return Row(name, **where, **words, **numbers, labels=labels)


# ---- shards ---------------------------------------------------------------------------------------


def _of_shards(pattern: str) -> Iterator[Row | str]:
    """Tars whose members are `ID/NAME.jpg` and captions `ID/NAME.txt`, those of an id side by side in one tar."""
    from lit_datamodules.shard_paths import shard_paths
    from lit_datamodules.tar_index import index_tar

    for shard in shard_paths(pattern):
        if not isinstance(shard, Path):
            raise DataError(f"{pattern} lies elsewhere: copy the shards to a disk that all jobs see")
        try:
            index = index_tar(shard)
        except OSError as error:
            raise DataError(f"cannot read shard {shard}: {error.strerror}") from error
        for fault in index.faults:
            yield f"{shard} at byte {fault.offset}: {fault.key}{' ' if fault.key else ''}{fault.reason}"
        people: dict[str, list[tuple[str, int, int]]] = {}
        for entry in index.entries:
            name, slash, key = entry.key.removeprefix("./").partition("/")
            if not slash or "/" in key:
                yield f"{shard}: {entry.key} is not ID/NAME"
                continue
            files = [(f"{key}.{kind}", m.offset, m.size) for kind, m in entry.members.items()]
            people.setdefault(name, []).extend(files)
        for name, members in people.items():
            there = any(member.rpartition(".")[2] in PICTURES for member, _, _ in members)
            why = _fault(name) or ("" if there else f"{name}: {shard} holds no picture of it")
            yield why or Row(name, shard=str(shard.absolute()), members=members)


def member_writer(row: Row) -> Callable[[Path], None]:
    """Copies the pictures and captions of a row that has no folder of its own into one."""
    from lit_datamodules.tar_index import Member, read_member

    def of_shard(folder: Path) -> None:
        for name, offset, size in row.members:
            data = read_member(Path(row.shard), Member(offset, size))
            if len(data) != size:
                raise DataError(f"{row.shard} has changed: {row.id}/{name} is not where it was; plan the bank again")
            (folder / name).write_bytes(data)

    def of_files(folder: Path) -> None:
        for number, text in enumerate(row.files):
            picture = Path(text)
            caption = picture.with_suffix(".txt")
            for path in (picture, caption) if caption.is_file() else (picture,):
                (folder / f"{number:04d}-{path.name}").symlink_to(path)

    return of_shard if row.shard else of_files
