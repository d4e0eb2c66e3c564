"""WebDataset shards that say what they hold: byte for byte the same for the same samples.

Beside the shards lies `shards.json` with the samples, bytes and sha256 of each. Without it a flipped byte goes unseen.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lit_datamodules.errors import DataError

MANIFEST = "shards.json"


def write_shards(samples: Iterable[dict[str, Any]], folder: Path, per_shard: int = 1000) -> dict[str, dict[str, Any]]:
    """Write samples `{extension: bytes}` as `00000.tar` and so on, and the manifest last.

    Keys are nine digits, five of the shard and four of the place in it, as img2dataset gives them.

    Returns:
        The manifest: samples, bytes and sha256 by file name.
    """
    from webdataset import TarWriter

    if not 1 <= per_shard <= 10_000:
        raise DataError(f"per_shard must lie between 1 and 10000, not {per_shard}")
    folder.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, dict[str, Any]] = {}
    writer, count, temporary = None, 0, folder / f".tmp-{os.getpid()}.tar"

    def close() -> None:
        nonlocal writer
        if writer is None:
            return
        writer.close()
        writer = None
        name = f"{len(manifest):05d}.tar"
        manifest[name] = {"samples": count, "bytes": temporary.stat().st_size, "sha256": sha256_of_file(temporary)}
        os.replace(temporary, folder / name)

    try:
        for sample in samples:
            if count == per_shard:
                close()
            if writer is None:
                writer, count = TarWriter(str(temporary), encoder=False, mtime=0), 0
            writer.write({"__key__": f"{len(manifest):05d}{count:04d}", **sample})
            count += 1
        close()
    finally:
        temporary.unlink(missing_ok=True)
    write_json(manifest, folder / MANIFEST)
    return manifest


def write_json(value: Any, path: Path) -> None:
    """Write JSON, all or nothing."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of_file(path: Path) -> str:
    """Hash of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stated(path: Path) -> dict[str, Any] | None:
    """What the manifest beside a shard says of it; None if there is none.

    Raises:
        DataError: The manifest is damaged.
    """
    manifest = path.with_name(MANIFEST)
    if not manifest.is_file():
        return None
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
        said = found.get(path.name)
        if said is not None and not {"bytes", "sha256"} <= said.keys():
            raise ValueError(f"it says neither bytes nor sha256 of {path.name}")
        return said
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{manifest} is damaged: {error}; pack the shards again, or remove it") from error


def difference(path: Path, hashed: bool = True) -> str:
    """Why a shard is not the one that was written; "" if it is, or if nothing is known of it.

    Args:
        hashed: Read the whole shard to compare its hash, and not only its size.
    """
    said = stated(path)
    if said is None:
        return ""
    if path.stat().st_size != said["bytes"]:
        return f"shard {path} has {path.stat().st_size} bytes, {MANIFEST} says {said['bytes']}"
    if hashed and sha256_of_file(path) != said["sha256"]:
        return f"shard {path} was changed or damaged: its sha256 is not the one in {MANIFEST}"
    return ""
