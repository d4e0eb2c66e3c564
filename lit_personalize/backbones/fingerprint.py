"""The identity of a base: hashes of its weights and noise schedule, then the edits applied to it, in order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

_HASHED: dict[tuple[str, int, int], str] = {}


def _hash_file(path: Path) -> str:
    """SHA-256 of a file, remembered per (path, size, modification time)."""
    stat = path.stat()
    key = (str(path.absolute()), stat.st_size, stat.st_mtime_ns)
    if key not in _HASHED:
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        _HASHED[key] = digest.hexdigest()
    return _HASHED[key]


def fingerprint_of(path: Path, edits: Iterable[str] = ()) -> str:
    """Sixteen hex digits for the weights at `path` (a directory or one file) and a list of edits."""
    files = [path] if path.is_file() else sorted(
        p for pattern in ("*.safetensors", "scheduler_config.json") for p in path.rglob(pattern) if p.is_file()
    )
    hashes = {p.name if path.is_file() else p.relative_to(path).as_posix(): _hash_file(p) for p in files}
    text = json.dumps({"weights": hashes, "edits": list(edits)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_identity(module: nn.Module) -> str:
    """Sixteen hex digits for the weights and buffers of a module as they are in memory, and their precision."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
