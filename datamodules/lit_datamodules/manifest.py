"""The fate of every input file, one JSON line each."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Record:
    """One input file."""

    path: str
    fate: Literal["used", "skipped"]
    reason: str = ""
    concept: str = ""
    width: int = 0
    height: int = 0
    sha256: str = ""
    caption: str = ""
    caption_source: str = ""


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_manifest(records: list[Record], path: Path) -> None:
    """Write `manifest.jsonl` whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    os.replace(temporary, path)
