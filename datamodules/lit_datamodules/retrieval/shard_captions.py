"""The captions of a shard in batches, read and tokenized while the batch before is embedded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_datamodules.captions import decode_caption
from lit_datamodules.errors import DataError
from lit_datamodules.retrieval.parts import Part, fields_of
from lit_datamodules.retrieval.plan import CaptionEncoder, Filters
from lit_datamodules.tar_index import CAPTION_KEYS, IMAGE_KEYS, Entry, index_tar

AHEAD = 4
"""Batches that are read and tokenized while one is embedded."""
WINDOW = 16
"""Batches over which captions are sorted by length: each takes the time of its longest caption."""


@dataclass(frozen=True)
class Captioned:
    """A sample with a caption and a picture."""

    entry: Entry
    caption: str
    meta: str
    """The sample's `json`, as text; "" if it has none."""

    @property
    def row(self) -> dict[str, Any]:
        """The columns `parts.PICTURE`."""
        kind = next(kind for kind in IMAGE_KEYS if kind in self.entry.members)
        image = self.entry.members[kind]
        return {"key": self.entry.key, "kind": kind, "offset": image.offset, "bytes": image.size,
                "caption": self.caption, "meta": self.meta}  # fmt: skip


def captioned_batches(
    path: Path, part: Part, batch_size: int, encoder: CaptionEncoder, filters: Filters | None = None
) -> Iterator[tuple[Sequence[Captioned], Any]]:
    """Samples of a shard with the tokens of their captions, `batch_size` of like length at a time.

    Damaged places, and samples without a caption or picture, go to `part.faults`; samples that the filters drop are
    counted in `part.dropped`.

    Raises:
        DataError: The file cannot be read at all.
    """
    try:
        index = index_tar(path)
        part.samples = len(index.entries)
    except OSError as error:
        raise DataError(f"cannot read shard {path}: {error.strerror}") from error
    part.faults += [f"{part.shard}{':' + fault.key if fault.key else ''} {fault.reason}" for fault in index.faults]
    with path.open("rb") as file, ThreadPoolExecutor(1) as reader:
        groups = _groups(index.entries, file.fileno(), batch_size, part, filters)

        def work() -> tuple[Sequence[Captioned], Any] | None:
            group = next(groups, None)
            return None if group is None else (group, encoder.tokenize([row.caption for row in group]))

        waiting: list[Future[tuple[Sequence[Captioned], Any] | None]] = [reader.submit(work) for _ in range(AHEAD)]
        while (found := waiting.pop(0).result()) is not None:
            waiting.append(reader.submit(work))
            yield found


def _groups(
    entries: Sequence[Entry], fd: int, size: int, part: Part, filters: Filters | None
) -> Iterator[Sequence[Captioned]]:
    read: list[Captioned] = []
    for entry in entries:
        row = _captioned(entry, fd, part)
        if row is None:
            continue
        if filters and filters.asks:
            fields = fields_of(row.meta)
            if fields is None:
                part.faults.append(f"{part.shard}:{entry.key} has a json that is none; its fields count as missing")
            if reason := filters.reason(fields or {}):
                part.dropped[reason] += 1
                continue
        read.append(row)
        if len(read) == WINDOW * size:
            yield from _by_length(read, size)
            read = []
    yield from _by_length(read, size)


def _by_length(rows: list[Captioned], size: int) -> Iterator[Sequence[Captioned]]:
    rows.sort(key=lambda row: len(row.caption))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _captioned(entry: Entry, fd: int, part: Part) -> Captioned | None:
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
    return Captioned(entry, text, meta)
