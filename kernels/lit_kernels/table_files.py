"""Files of what was measured on a GPU: a table of cases, each with the times of its paths and tiles.

A table is a JSON file named after its GPU, `NVIDIA-H200.json` for an "NVIDIA H200". It is looked for in the folder that
`LIT_KERNELS_TABLES` names, then among those that the package brings along. `litp profile kernels --tune` writes it, and
`lit_kernels.dispatch` looks cases up.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

FOLDER = Path(__file__).parent / "tables"
VARIABLE = "LIT_KERNELS_TABLES"
FORMAT = 1
PATHS = ("triton", "fallback")


class Key(NamedTuple):
    """What a case is looked up by."""

    operator: str
    dtype: torch.dtype
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class Entry:
    """One case as it was measured; times in microseconds, forward and backward together where there are gradients."""

    operator: str
    dtype: str
    sizes: dict[str, int]
    path: str
    """The faster one, "triton" or "fallback"."""
    triton_us: float | None
    """None where no tile fits this GPU."""
    fallback_us: float
    tiles: dict[str, str] = field(default_factory=dict)
    """The fastest tile of each part ("forward", "backward") that has several."""
    tried_us: dict[str, dict[str, float]] = field(default_factory=dict)
    """By part, the time of each of its tiles."""
    measured: str = ""
    """Date and versions."""

    @property
    def key(self) -> Key:
        return Key(self.operator, getattr(torch, self.dtype), self.sizes)


def file_of(gpu: str, folder: Path) -> Path:
    """Where a folder has a GPU's table."""
    return folder / f"{re.sub(r'[^A-Za-z0-9_.+]+', '-', gpu)}.json"


def own_folder() -> Path:
    """The folder that the environment names, or the package's.

    Raises:
        ValueError: The environment names no folder.
    """
    if not (named := os.environ.get(VARIABLE, "")):
        return FOLDER
    if not Path(named).is_dir():
        raise ValueError(f"{VARIABLE}={named}: there is no such folder; unset it, or make the folder")
    return Path(named)


def read(file: Path) -> list[Entry]:
    """The entries of a table.

    Raises:
        ValueError: It is no table of this format.
    """
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        if told["format"] != FORMAT:
            raise ValueError(f"its format is {told['format']}, not {FORMAT}")
        return [_checked(Entry(**entry)) for entry in told["entries"]]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        fix = f"remove the file, or measure it anew: rm {file}; litp profile kernels --tune --table {file.parent}"
        raise ValueError(f"{file} is no table of kernels ({type(error).__name__}: {error}); {fix}") from error


def write(file: Path, gpu: str, entries: Sequence[Entry]) -> None:
    """Put a table in its place, whole or not at all.

    Raises:
        OSError: The disk is full, or closed to this user.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    lines = ",\n".join(json.dumps(asdict(entry)) for entry in entries)
    text = f'{{"format": {FORMAT}, "gpu": {json.dumps(gpu)}, "entries": [\n{lines}\n]}}\n'
    try:
        with temporary.open("w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _checked(entry: Entry) -> Entry:
    if entry.path not in PATHS:
        raise ValueError(f"the path of {entry.operator} {entry.sizes} is {entry.path!r}, not one of {', '.join(PATHS)}")
    if not entry.sizes or not all(type(size) is int and size > 0 for size in entry.sizes.values()):
        raise ValueError(f"the sizes of {entry.operator} are {entry.sizes}, not whole numbers above 0")
    if not isinstance(getattr(torch, entry.dtype), torch.dtype):
        raise ValueError(f"the dtype of {entry.operator} is {entry.dtype!r}")
    if not all(isinstance(name, str) for name in entry.tiles.values()):
        raise ValueError(f"the tiles of {entry.operator} are {entry.tiles}")
    return entry
