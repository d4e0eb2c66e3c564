"""What a long computation has found so far, in a folder: the same call goes on after its last whole step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_personalize import atomic
from lit_personalize.errors import UsageError

RECORD = "progress.json"


class Progress:
    """Named sets of tensors; `folder` None keeps nothing.

    Args:
        told: What the computation is of.

    Raises:
        UsageError: The folder is of another computation.
    """

    def __init__(self, folder: Path | None, told: Mapping[str, Any]):
        self.folder = folder
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / RECORD
        if record.exists() and json.loads(record.read_text(encoding="utf-8")) != told:
            raise UsageError(f"{folder} holds another computation's state, see {RECORD} in it: remove it to begin anew")
        if self._writes:
            atomic.write_text(record, json.dumps(told, indent=1) + "\n")

    @property
    def _writes(self) -> bool:
        return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0

    def get(self, name: str) -> dict[str, Tensor] | None:
        """A set that was put; None if there is none."""
        if self.folder is None or not (self.folder / f"{name}.safetensors").is_file():
            return None
        return load_file(self.folder / f"{name}.safetensors")

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a set in place of what had its name; all ranks may go on when it is there."""
        if self.folder is None:
            return
        if self._writes:
            staged = self.folder / f".tmp-{name}"
            save_file({key: value.contiguous() for key, value in tensors.items()}, staged)
            staged.replace(self.folder / f"{name}.safetensors")
        if dist.is_available() and dist.is_initialized():
            dist.barrier()

    def clear(self) -> None:
        """Remove the folder: the computation is at its end."""
        if self.folder is None or not self._writes:
            return
        for path in [*self.folder.glob("*.safetensors"), self.folder / RECORD]:
            path.unlink(missing_ok=True)
        self.folder.rmdir()
