"""What a safetensors header may say that its reader lets pass: names that stand twice, numbers that are none."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_personalize.errors import DataError


def refuse_repeated_names(path: Path) -> None:
    """Refuse a header that names something twice: another reader may take the other one.

    Args:
        path: A file that safetensors has opened, so that its header is whole, small enough and JSON.

    Raises:
        DataError: A name stands twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{path}: its header names {twice!r} twice; have its author write the file again")
        return found

    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        json.loads(file.read(length), object_pairs_hook=once)


def encoder_of(metadata: Mapping[str, str], path: Path) -> int | None:
    """Which text encoder, counted from 0, an embedding's file says that it is for.

    Raises:
        DataError: It is none of the two that a base may have.
    """
    if (stated := metadata.get("litp.encoder")) is None:
        return None
    if stated not in ("0", "1"):
        raise DataError(f"{path}: its metadata litp.encoder is {stated!r}, not 0 or 1; export it again")
    return int(stated)
