"""The fate of every input file, one JSON line each."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import distributed

from lit_datamodules.errors import DataError
from lit_datamodules.image_files import natural_key

Fate = Literal["used", "skipped", "ignored"]


@dataclass(frozen=True)
class Record:
    """One input file, or one sample of a shard (`shard.tar:key`).

    `skipped` is what should have been used and could not be; `ignored` is what is no input at all.
    """

    path: str
    fate: Fate
    reason: str = ""
    role: str = ""
    """"concept", "held out" or "regularization"."""
    concept: str = ""
    width: int = 0
    height: int = 0
    mode: str = ""
    sha256: str = ""
    crop: tuple[int, int, int, int] | None = None
    """Left, top, right, bottom in the upright picture, of the largest view; None where steps decide it."""
    sizes: tuple[tuple[int, int], ...] = ()
    """Heights and widths in pixels of the views, before any augmentation; none where steps decide them."""
    mask: str = ""
    """File that says which parts count in the loss."""
    caption: str = ""
    caption_source: str = ""


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def ignore_rest(folder: Path, seen: Iterable[str]) -> list[Record]:
    """Records for everything in `folder` that no record names yet."""
    names = set(seen)
    records = []
    for path in sorted(folder.iterdir(), key=lambda p: natural_key(p.name)):
        if str(path) not in names:
            if path.is_dir():
                reason = "a folder; only files directly in the given folder are read"
            elif path.name.startswith("."):
                reason = "hidden"
            elif path.suffix.lower() == ".txt":
                reason = "no picture has this name"
            else:
                reason = "not a jpg, png or webp file"
            records.append(Record(str(path), "ignored", reason))
    return records


def skip(records: list[Record], path: str, reason: str) -> None:
    """Note that an input which was counted as used turned out to be damaged; it stays told once."""
    records[:] = [replace(r, fate="skipped", reason=reason) if r.path == path else r for r in records]


def share_skipped(records: list[Record]) -> None:
    """Note what other ranks skipped; all of them call this together."""
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, [(r.path, r.reason) for r in records if r.fate == "skipped"])
    for path, reason in dict(pair for rank in found for pair in rank).items():
        skip(records, path, reason)


def check_skipped(records: Sequence[Record], strict: bool, max_skipped: int) -> None:
    """Refuse unusable inputs: any of them if `strict`, else more than `max_skipped`.

    Raises:
        DataError: It lists them with their reasons.
    """
    skipped = [record for record in records if record.fate == "skipped"]
    if not skipped or (not strict and len(skipped) <= max_skipped):
        return
    shown = [f"  {record.reason}" for record in skipped[:10]]
    if len(skipped) > len(shown):
        shown.append(f"  and {len(skipped) - len(shown)} more, see the manifest")
    noun = "input" if len(skipped) == 1 else "inputs"
    allowed = "" if strict else f", {max_skipped} may be skipped (data.max_skipped)"
    fix = "mend or remove them, or set data.strict to false to go on without" if strict else "mend or remove them"
    raise DataError("\n".join([f"{len(skipped)} {noun} cannot be used{allowed}; {fix}:", *shown]))


def write_manifest(records: Sequence[Record], path: Path) -> None:
    """Write `manifest.jsonl`, all or nothing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a full disk is noticed while writing, where no name is known
        raise
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
