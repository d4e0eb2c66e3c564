"""Where every sample of a WebDataset shard lies, and all that is wrong with the shard.

A tar reader that meets a damaged header ends there without a word, and the rest of the shard is lost. Here the
damage is noted, reading goes on at the next header that is whole, and nothing is lost silently. Only headers are read:
pictures stay on the disk until they are asked for.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

BLOCK = 512
ZEROS = bytes(BLOCK)
IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
CAPTION_KEYS = ("txt", "text", "caption")
CHUNK = 1 << 20
MAGIC, MAGIC_AT = b"ustar", 257
"""What a header holds, and at which of its bytes."""
NO_FILES = {
    tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link", tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device", tarfile.FIFOTYPE: "a pipe",
}  # fmt: skip
"""Members that reach for something outside of the shard; folders and headers of archives do not."""
LONGEST_NAME = 1 << 16
"""Bytes of a name in an extended header; more is damage."""


@dataclass(frozen=True)
class Member:
    """Bytes of one file in the shard."""

    offset: int
    size: int


@dataclass
class Entry:
    """One sample: its files by lower-case extension, as WebDataset groups them."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)

    def first(self, kinds: tuple[str, ...]) -> tuple[str, Member] | None:
        """The first of some kinds of file that the sample has."""
        return next(((kind, self.members[kind]) for kind in kinds if kind in self.members), None)


@dataclass(frozen=True)
class Fault:
    """Something wrong at a byte of the shard, with the sample where that is known."""

    offset: int
    reason: str
    key: str = ""


@dataclass
class TarIndex:
    """Samples in the shard's order, and its faults; samples of a damaged shard may lack files."""

    path: Path
    entries: list[Entry] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    @property
    def short(self) -> str:
        """Why the end of the shard is missing; "" if it is there."""
        return next((f.reason for f in self.faults if f.reason.startswith(("is cut off", "is empty"))), "")

    @property
    def identity(self) -> str:
        """A hash of names, places and sizes: the same for a copy, another for a shard that was packed otherwise."""
        places = [(e.key, sorted((kind, m.offset, m.size) for kind, m in e.members.items())) for e in self.entries]
        return hashlib.sha256(repr(places).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def index_tar(path: Path) -> TarIndex:
    """Read the headers of a shard.

    Every fault is in the result; a second sample of one key is a fault and is left out.

    Raises:
        OSError: The file cannot be opened or read.
    """
    index = TarIndex(path)
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        if reason := _no_tar(file.read(BLOCK), size):
            index.faults.append(Fault(0, reason))
            return index
        seen: set[str] = set()
        entry = None
        for name, member in _files(file, size, index.faults):
            key, kind = split_name(name)
            if not kind:
                continue
            if key.startswith("/") or ".." in key.split("/"):
                index.faults.append(Fault(member.offset, f"names a file outside of it, {name}, which is left out"))
                continue
            if entry is None or entry.key != key or kind in entry.members:
                entry = Entry(key)
                if key in seen:
                    index.faults.append(Fault(member.offset, "a sample of this key came before", key))
                else:
                    seen.add(key)
                    index.entries.append(entry)
            entry.members[kind] = member
    return index


def split_name(name: str) -> tuple[str, str]:
    """Key and lower-case extension: the name is cut at the first dot behind its last slash; ("", "") for no sample."""
    folder, slash, base = name.rpartition("/")
    stem, dot, kind = base.partition(".")
    return (f"{folder}{slash}{stem}", kind.lower()) if stem and dot else ("", "")


def read_member(path: Path, member: Member) -> bytes:
    """The bytes of one file of a shard; none where the shard has no such place, which a foreign index may name."""
    with path.open("rb") as file:
        if not 0 <= member.offset <= member.offset + member.size <= file.seek(0, io.SEEK_END):
            return b""
        file.seek(member.offset)
        return file.read(member.size)


def _no_tar(head: bytes, size: int) -> str:
    """Why a file is no tar at all; "" if it may be one."""
    if not size:
        return "is empty: 0 bytes"
    if head[:2] == b"\x1f\x8b":
        return "is compressed; unpack it with gunzip, since samples are read where they lie"
    if head.lstrip()[:1] == b"<":
        return "is a web page and no tar, perhaps a server's error message"
    return ""


def _files(file: io.BufferedReader, size: int, faults: list[Fault]) -> Iterator[tuple[str, Member]]:
    """Name and place of every regular file; what is wrong goes to `faults`."""
    offset, data, name, real_size = 0, 0, "", None
    while offset + BLOCK <= size:
        file.seek(offset)
        block = file.read(BLOCK)
        if block == ZEROS and _zero_until_end(file):
            return
        info = _header(block)
        if info is None:
            found = _next_header(file, data)  # where bytes were lost, it lies before the place that was expected
            then = f"reading goes on at byte {found}" if found else "the rest is lost"
            faults.append(Fault(offset, f"is damaged at byte {offset}; {then}"))
            if not found:
                return
            offset, name, real_size = found, "", None
            continue
        data = offset + BLOCK
        length = info.size if real_size is None else real_size
        if data + length > size:
            faults.append(Fault(offset, f"is cut off within {name or info.name}", split_name(name or info.name)[0]))
            return
        offset = data + -(-length // BLOCK) * BLOCK
        if info.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME) and length <= LONGEST_NAME:
            text = file.read(length)
            if info.type == tarfile.XHDTYPE:
                records = _pax_records(text)
                name = records.get("path", name)
                real_size = int(records["size"]) if records.get("size", "").isdigit() else None
            else:
                name = text.rstrip(b"\0").decode("utf-8", "surrogateescape")
            continue
        if info.isreg():
            yield name or info.name, Member(data, length)
        elif info.type in NO_FILES:
            faults.append(Fault(offset - BLOCK, f"holds {NO_FILES[info.type]}, {name or info.name}, which is not read"))
        name, real_size = "", None
    faults.append(Fault(offset, "is cut off: its end marker is missing"))


def _header(block: bytes) -> tarfile.TarInfo | None:
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    return info if info.size >= 0 else None


def _next_header(file: io.BufferedReader, offset: int) -> int:
    """The first byte from `offset` on at which a whole header begins; 0 if there is none."""
    first = max(1, offset)
    while True:
        file.seek(offset)
        chunk = file.read(CHUNK)
        at = chunk.find(MAGIC)
        while at >= 0:
            start = offset + at - MAGIC_AT
            if start >= first:
                file.seek(start)
                if _header(file.read(BLOCK)):
                    return start
            at = chunk.find(MAGIC, at + 1)
        if len(chunk) < CHUNK:
            return 0
        offset += CHUNK - len(MAGIC)


def _zero_until_end(file: io.BufferedReader) -> bool:
    while chunk := file.read(CHUNK):
        if chunk.count(0) != len(chunk):
            return False
    return True


def _pax_records(text: bytes) -> dict[str, str]:
    """Records "length key=value\\n" of an extended header; a broken one ends them."""
    records: dict[str, str] = {}
    while text:
        length, blank, _ = text.partition(b" ")
        if not blank or not length.isdigit() or not 0 < int(length) <= len(text):
            break
        key, _, value = text[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        text = text[int(length) :]
    return records
