"""One folder that holds all that a run opens, and the list by which it is checked where it arrives."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lit_personalize import atomic
from lit_personalize.errors import DataError

if TYPE_CHECKING:
    from lit_personalize.cli.prefetch_files import Needed

SMALL = 64 * 2**20
"""Bytes up to which a listed file has its sha256; of a larger one its size is compared."""
FORMAT = 1
HEAD = """\
# Made by litp prefetch: all that it names lies in this folder, so that it needs no network.
# cd into the folder, then: litp fit -c run.yaml
"""


def copy_all(needs: list[Needed], config: dict[str, Any], folder: Path) -> Path:
    """Copy what is not in the package into `folder`; what is there from before is kept. Returns its run.yaml.

    Raises:
        OSError: There is no room.
    """
    pairs = {folder / place: path for need in needs for path, place in need.places.items() if place}
    left = {target: source for target, source in pairs.items() if not _is_copy(source, target)}
    folder.mkdir(parents=True, exist_ok=True)
    wanted = sum(source.stat().st_size for source in left.values())
    if wanted > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, f"no room for {wanted} bytes", str(folder))
    for target, source in left.items():
        with atomic.replacing(target) as temporary:
            shutil.copyfile(source, temporary)
            status = source.stat()
            os.utime(temporary, ns=(status.st_atime_ns, status.st_mtime_ns))
    whole: dict[str, Any] = json.loads(json.dumps(config, default=str))
    for need in needs:
        if need.key and need.value is not None:
            _put(whole, need.key, need.value)
    whole["root"] = "runs"
    if "init_args" in (whole.get("data") or {}) and any(need.key.startswith("data.init_args") for need in needs):
        whole["data"]["init_args"].setdefault("cache_dir", "cache")
    atomic.write_text(folder / "run.yaml", HEAD + yaml.safe_dump(whole, sort_keys=False, allow_unicode=True))
    return folder / "run.yaml"


def _is_copy(source: Path, target: Path) -> bool:
    if not target.is_file():
        return False
    one, other = source.stat(), target.stat()
    return (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)


def _put(config: Any, key: str, value: str) -> None:
    *parts, last = key.split(".")
    for part in parts:
        config = config[int(part)] if isinstance(config, list) else config[part]
    config[last] = value


def write_list(path: Path, needs: list[Needed], folder: Path | None, missing: list[dict[str, str]]) -> dict[str, Any]:
    """Write what there is: path, bytes and, of small files, sha256; returns counts.

    Args:
        folder: That it was copied into, with all that caches added; paths are then below it.
    """
    rows = []
    if folder is None:
        for need in needs:
            rows += [_row(need.what, file, str(file.absolute())) for file in need.files]
    else:
        what = {place: need.what for need in needs for place in need.places.values()}
        for file in sorted(file for file in folder.rglob("*") if file.is_file() and file != path):
            name = file.relative_to(folder).as_posix()
            if not name.startswith("runs/"):
                rows.append(_row(what.get(name, "made by litp prefetch"), file, name))
    total = sum(row["bytes"] for row in rows)
    told = {"format": FORMAT, "bytes": total, "files": rows, "missing": missing}
    atomic.write_text(path, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    return {"files": len(rows), "bytes": total}


def _row(what: str, file: Path, name: str) -> dict[str, Any]:
    size = file.stat().st_size
    digest = hashlib.sha256(file.read_bytes()).hexdigest() if size <= SMALL else None
    return {"what": what, "path": name, "bytes": size, "sha256": digest}


def wrong_with(folder: Path) -> list[str]:
    """What of a copied folder is not as its list says.

    Raises:
        DataError: It has no list, or none that can be read.
    """
    path = folder / "prefetch.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = [(str(row["path"]), int(row["bytes"]), row["sha256"]) for row in found["files"]]
    except FileNotFoundError as error:
        raise DataError(f"{folder} has no prefetch.json: litp prefetch --to DIR makes such a folder") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error!r}): copy the folder again") from error
    wrong = []
    for name, size, digest in rows:
        file = folder / name
        if not file.is_file():
            wrong.append(f"{file} is not there")
        elif file.stat().st_size != size:
            wrong.append(f"{file} has {file.stat().st_size} bytes instead of {size}")
        elif digest and hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            wrong.append(f"{file} has another sha256")
    return wrong
