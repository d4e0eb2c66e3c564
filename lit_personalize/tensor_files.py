"""The head of a safetensors file: what its tensors are, and whether all of them came. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lit_personalize.errors import DataError

LONGEST = 100 * 2**20
"""Bytes of a header; as in safetensors itself."""


def read_header(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Where the bytes of the tensors begin, and each tensor's `dtype`, `shape` and `data_offsets`.

    Raises:
        DataError: It is no such file, or ends before its last tensor does.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(LONGEST, size - 8):
                raise DataError(f"{path} is damaged: its header is longer than the file")
            header = json.loads(file.read(length))
        tensors = {str(name): about for name, about in header.items() if name != "__metadata__"}
        ends = 8 + length + max((int(about["data_offsets"][1]) for about in tensors.values()), default=0)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(f"{path} is no safetensors file ({error!r})") from error
    if ends != size:
        raise DataError(f"{path} is cut short or damaged: it has {size} bytes, its tensors end at {ends}")
    return 8 + length, tensors
