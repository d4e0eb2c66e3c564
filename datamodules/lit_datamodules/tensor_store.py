"""A cache on disk whose entries are named by all that decides them: none can be stale, and equal ones are shared.

Entries lie in safetensors files that never change once they are there, so any number of runs and processes read and
fill one store at once. An entry that two of them compute at the same time is kept twice and is the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_datamodules.errors import DataError

Entry = Mapping[str, Tensor]


def key_of(*parts: Any) -> str:
    """The name of an entry: a hash of what decides it, given as values that JSON can write."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]


class TensorStore:
    """Named tensors under keys.

    Args:
        folder: Of the store; made when something is put into it.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._place: dict[str, Path] = {}
        self._names: dict[str, list[str]] = {}
        self._known: set[Path] = set()
        self._open: dict[Path, Any] = {}
        self.refresh()

    def refresh(self) -> None:
        """Take note of files that other processes have written.

        Raises:
            DataError: A file is damaged; it names it.
        """
        for path in sorted(self.folder.glob("*.safetensors")):
            if path not in self._known:
                for name in _names_in(path):
                    key, _, part = name.partition("/")
                    if self._place.setdefault(key, path) == path:
                        self._names.setdefault(key, []).append(part)
                self._known.add(path)

    def __contains__(self, key: str) -> bool:
        return key in self._place

    def __len__(self) -> int:
        return len(self._place)

    def get(self, key: str) -> dict[str, Tensor]:
        """The tensors of an entry, on the CPU.

        Raises:
            KeyError: There is none.
            DataError: Its file is damaged or gone.
        """
        path = self._place[key]
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, "pt")
            file = self._open[path]
            return {name: file.get_tensor(f"{key}/{name}") for name in self._names[key]}
        except (SafetensorError, OSError) as error:
            raise DataError(f"cache file {path} is damaged or gone ({error}); remove it, it is filled again") from error

    def put(self, entries: Mapping[str, Entry]) -> None:
        """Keep entries in one new file, all or nothing; those that are there already are left out.

        Raises:
            OSError: The disk is full or closed to this user; its `filename` is the cache's file.
        """
        new = {key: entry for key, entry in entries.items() if key not in self}
        if not new:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{key_of(sorted(new))}.safetensors"
        temporary = self.folder / f".tmp-{os.getpid()}-{path.name}"
        try:
            save_file({f"{k}/{n}": t.detach().contiguous() for k, e in new.items() for n, t in e.items()}, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except SafetensorError as error:  # what a full disk looks like from its writer
            raise OSError(28, f"No space left on device ({error})", str(path)) from error
        finally:
            temporary.unlink(missing_ok=True)
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a worker process opens files itself


def _names_in(path: Path) -> list[str]:
    """Names of the tensors of a safetensors file, from its header; its length is checked, too."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError("its header is cut off")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((int(about["data_offsets"][1]) for about in header.values()), default=0)
        if end != size - 8 - length:
            raise ValueError(f"it has {size} bytes, its header says {8 + length + end}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise DataError(f"cache file {path} is damaged ({error}); remove it, it is filled again") from error
    return list(header)
