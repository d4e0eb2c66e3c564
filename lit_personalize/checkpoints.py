"""Checkpoint directories: filled under a temporary name, flushed, marked COMPLETE with hashes, renamed.

`checkpoints/step-00000250/` either does not exist, or is whole and says how to check that it is. A reader
walks from the newest back to the first one whose hashes hold, and tells why it passed over the others.
What is inside is the writer's affair: one file, or the many files of a sharded strategy.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from lit_personalize import atomic
from lit_personalize.errors import LitpError

log = logging.getLogger(__name__)
MARK = "COMPLETE"
STATE = "state.ckpt"
"""The trainer's state in a checkpoint directory: a file, or a directory where a strategy shards it."""
FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_STAGED, _DAMAGED = ".tmp-step-", ".damaged-step-"
_PACKAGES = ("lit-personalize", "lightning", "torch")


class PublishError(LitpError):
    """A checkpoint could not be written; those published before are untouched."""


@dataclass(frozen=True)
class Found:
    """A checkpoint that is whole."""

    path: Path
    step: int
    skipped: list[str] = field(default_factory=list)
    """Why each newer one was passed over, newest first."""

    @property
    def state(self) -> Path:
        """What `Trainer.fit(ckpt_path=..., weights_only=True)` takes."""
        return self.path / STATE


def directory(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` stands once published."""
    return Path(folder) / f"step-{step:08d}"


def staged(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` stands while it is being written."""
    return Path(folder) / f"{_STAGED}{step:08d}"


def published(folder: Path) -> list[tuple[int, Path]]:
    """Step and directory of every published checkpoint, oldest first, unchecked."""
    entries = Path(folder).iterdir() if Path(folder).is_dir() else iter(())
    named = ((_NAME.fullmatch(path.name), path) for path in entries)
    return sorted((int(match[1]), path) for match, path in named if match)


# ---- writing --------------------------------------------------------------------------------------


def publish(
    folder: Path,
    step: int,
    fill: Callable[[Path], None],
    *,
    needed_bytes: int = 0,
    details: dict[str, Any] | None = None,
) -> Path:
    """Publish one checkpoint: `fill` writes into a temporary directory, which then gets its name.

    Args:
        fill: Writes files into the directory that it is given.
        needed_bytes: Free space to ask for before anything is written; 0 is unknown.
        details: Added to COMPLETE; plain JSON types.

    Raises:
        PublishError: The disk is full or failed, or a whole checkpoint of this step exists.
    """
    place = stage(folder, step, needed_bytes=needed_bytes)
    try:
        fill(place)
    except OSError as error:
        discard(folder, step)
        raise unwritten(folder, step, error) from error
    except BaseException:
        discard(folder, step)
        raise
    return seal(folder, step, details=details)


def stage(folder: Path, step: int, *, needed_bytes: int = 0) -> Path:
    """Make the empty temporary directory for `step` and clear leftovers of killed saves.

    Raises:
        PublishError: See `publish`.
    """
    final, place = directory(folder, step), staged(folder, step)
    if final.exists() and not problems(final):
        raise PublishError(f"{final} is already published and is never overwritten; use another run name")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(folder)
        free = shutil.disk_usage(folder).free
        if free < needed_bytes:
            raise PublishError(
                f"checkpoint of step {step} needs {_mebibytes(needed_bytes)}, {folder} has {_mebibytes(free)} free: "
                "make room or lower keep_last; earlier checkpoints are intact"
            )
        place.mkdir()
    except OSError as error:
        raise unwritten(folder, step, error) from error
    return place


def seal(folder: Path, step: int, *, details: dict[str, Any] | None = None) -> Path:
    """Flush the staged directory of `step`, mark it COMPLETE and give it its name.

    Raises:
        PublishError: See `publish`.
    """
    folder = Path(folder)
    final, place = directory(folder, step), staged(folder, step)
    try:
        for path in sorted(place.rglob("*"), reverse=True):
            atomic.flush(path)
        mark = {
            "format": FORMAT,
            "step": step,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "files": {str(path.relative_to(place)): _describe(path) for path in _files(place)},
            "versions": {name: _version(name) for name in _PACKAGES},
            **(details or {}),
        }
        if not mark["files"]:
            raise ValueError(f"nothing was written into {place}")
        atomic.write_text(place / MARK, json.dumps(mark, indent=1, sort_keys=True) + "\n")
        if final.exists():  # `stage` let it pass, so it is damaged
            os.rename(final, folder / f"{_DAMAGED}{step:08d}")
        os.rename(place, final)
        atomic.flush(folder)
        shutil.rmtree(folder / f"{_DAMAGED}{step:08d}", ignore_errors=True)
    except OSError as error:
        discard(folder, step)
        raise unwritten(folder, step, error) from error
    return final


def discard(folder: Path, step: int) -> None:
    """Remove what `stage` made for `step`."""
    shutil.rmtree(staged(folder, step), ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Remove the half-written directories of killed saves; only the owner of the run may call this."""
    for prefix in (_STAGED, _DAMAGED):
        for path in Path(folder).glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)


def prune(folder: Path, keep_last: int, keep: Iterable[int] = ()) -> list[int]:
    """Remove all but the newest `keep_last` checkpoints and those of the steps in `keep`.

    A directory loses its COMPLETE mark first, so that a kill in between leaves nothing that looks whole.

    Returns:
        The steps removed.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last must be at least 1, not {keep_last}")
    kept = set(keep)
    removed = [(step, path) for step, path in published(folder)[:-keep_last] if step not in kept]
    for _, path in removed:
        try:
            (path / MARK).unlink(missing_ok=True)
        except OSError as error:  # a folder that has turned read-only: nothing is lost by keeping it
            log.warning("%s stays: %s", path, error.strerror)
            continue
        shutil.rmtree(path, ignore_errors=True)
    return [step for step, _ in removed]


# ---- reading --------------------------------------------------------------------------------------


def find_complete(folder: Path) -> Found | None:
    """The newest checkpoint whose files are those that were written, or None."""
    skipped: list[str] = []
    for step, path in reversed(published(folder)):
        if not (reasons := problems(path)):
            return Found(path, step, skipped)
        skipped.append(f"{path.name}: {'; '.join(reasons)}")
    return None


def damaged(folder: Path) -> list[str]:
    """Why each published checkpoint that is not whole is not, newest first."""
    found = [(path, problems(path)) for _, path in reversed(published(folder))]
    return [f"{path.name}: {'; '.join(reasons)}" for path, reasons in found if reasons]


def unfinished(folder: Path) -> list[int]:
    """Steps of which a save was ended before it was published."""
    names = (path.name.removeprefix(_STAGED) for path in Path(folder).glob(f"{_STAGED}*"))
    return sorted(int(name) for name in names if name.isdecimal())


def find_best(folder: Path) -> Found | None:
    """The checkpoint that the file `best` names, or None if there is none or its files are not those written."""
    try:
        name = (folder / "best").read_text(encoding="utf-8").split()[0]
    except (FileNotFoundError, IndexError):
        return None
    for step, path in published(folder):
        if path.name == name:
            reasons = problems(path)
            return None if reasons else Found(path, step, [])
    return None


def problems(path: Path) -> list[str]:
    """What is wrong with a checkpoint directory; empty if every file has the hash in COMPLETE."""
    try:
        mark = json.loads((path / MARK).read_text(encoding="utf-8"))
        files, step, version = dict(mark["files"]), mark["step"], mark["format"]
    except FileNotFoundError:
        return [f"no {MARK}: it was not written to the end"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return [f"{MARK} is not readable ({error.__class__.__name__})"]
    if version != FORMAT:
        return [f"format {version}, this release reads {FORMAT}"]
    if directory(path.parent, step) != path:
        return [f"{MARK} is that of step {step}"]
    found = []
    for name, written in files.items():
        try:
            if (size := (path / name).stat().st_size) != written["bytes"]:
                found.append(f"{name} has {size} bytes instead of {written['bytes']}")
            elif _hash(path / name) != written["sha256"]:
                found.append(f"{name} has another sha256")
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
    return found


def size_of(path: Path) -> int:
    """Bytes of all files of a checkpoint directory."""
    return sum(file.stat().st_size for file in _files(path))


def read_state(path: Path) -> dict[str, Any]:
    """What the trainer saved into a checkpoint, tensors on the CPU; of a sharded state without the optimizer's.

    Raises:
        DataError: It would run code, or is damaged; see `export.pickled.read_pickle`.
    """
    from lit_personalize import sharded_state
    from lit_personalize.export.pickled import read_pickle

    state = Path(path) / STATE
    if sharded_state.kind(state) != "whole":
        return sharded_state.read_state(state)
    return dict(cast(dict[str, Any], read_pickle(state)))


def load_state(path: Path, *, averaged: bool = False) -> dict[str, Any]:
    """The trained tensors of a checkpoint by the objective's state-dict names, on the CPU.

    Args:
        path: A published checkpoint directory.
        averaged: Take the moving average instead where the run kept one.
    """
    state = read_state(path)
    own: dict[str, Any] = state["state_dict"]
    return {**own, **state[AVERAGED]} if averaged and AVERAGED in state else own


AVERAGED = "averaged_state_dict"
"""Key of the moving average in a state, with the names of `state_dict`."""


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MARK)


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _hash(path)}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def unwritten(folder: Path, step: int, error: OSError) -> PublishError:
    """The error for a step that the disk did not take."""
    reason = error.strerror or str(error)
    return PublishError(
        f"checkpoint of step {step} was not written to {folder}: {reason}; "
        "make room or give another place; earlier checkpoints are intact"
    )
