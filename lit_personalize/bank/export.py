"""A finished adapter as files that stock clients load: a folder that is whole, or not there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_personalize import atomic
from lit_personalize.adapters.protocol import AdapterWeights, LowRank
from lit_personalize.backbones.base import Base
from lit_personalize.bank.engine import Bank
from lit_personalize.bank.job import FinishedAdapter
from lit_personalize.errors import DataError, UsageError, VerificationError
from lit_personalize.export.exporter import Exported, export, file_stem
from lit_personalize.export.loading import read_adapter

RECORD = "adapter.json"
TOLERANCE = 1e-6
LAST = 10
"""Steps whose mean loss is noted."""


def sha256_of(place: Path) -> dict[str, str]:
    """Of every file of an exported adapter, `adapter.json` left out, by its name within the folder."""
    found = {}
    for path in sorted(path for path in place.rglob("*") if path.is_file() and path != place / RECORD):
        with path.open("rb") as file:
            found[path.relative_to(place).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def read_record(place: Path) -> dict[str, Any]:
    """`adapter.json` of an exported adapter, whose files are those that were written.

    Raises:
        DataError: It is missing or damaged, or a file has another sha256.
    """
    try:
        record = dict(json.loads((place / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{place / RECORD} cannot be read ({error}): remove {place} and train it again") from error
    found = sha256_of(place)
    if changed := [name for name, digest in record.get("sha256", found).items() if found.get(name) != digest]:
        raise DataError(f"{place / changed[0]} is not the file that was written: remove {place} and train it again")
    return {**record, "sha256": found}


def is_exported(folder: Path, name: str) -> bool:
    """Whether a whole adapter of that id is in the folder."""
    return (folder / name / RECORD).is_file()


def write(
    finished: FinishedAdapter,
    folder: Path,
    bank: Bank,
    formats: Sequence[str] = ("diffusers",),
    details: Mapping[str, object] | None = None,
    labels: Mapping[str, object] | None = None,
    replace: bool = True,
    staging: Path | None = None,
) -> list[Exported]:
    """Write the files of an adapter and `adapter.json` into `folder/<id>`, and read them back.

    Metadata and record have seed, initial seed, steps and skipped steps; the record also the files' sha256.

    Args:
        details: Into metadata and record, too.
        labels: Into the record.
        replace: An earlier one of the same id; otherwise, of two processes that write it, the second one raises.
        staging: Folder on the same file system in which it is made before it gets its name; by default `folder`.

    Raises:
        FileExistsError: There is one, and it is not to be replaced.
        UsageError: The adapter failed, or its id cannot name a folder.
        VerificationError: A file does not give back what was trained.
    """
    job, weights, base = finished.job, finished.weights, bank.objective.built
    if weights is None:
        raise UsageError(f"adapter {job.id} failed and cannot be exported: {finished.failure}")
    if file_stem(job.id) != job.id or job.id.startswith("."):
        raise UsageError(f"adapter id {job.id!r} cannot name a folder: use letters, digits, '_', '-' and '.'")
    noted = {
        **(details or {}), **job.details, "seed": job.seed, "init_seed": bank.init_seed, "steps": job.steps,
        "skipped": finished.skipped,
    }  # fmt: skip
    last = finished.losses[-LAST:]
    place = folder / job.id
    staged = (staging or folder) / f".tmp-{job.id}-{os.getpid()}-{secrets.token_hex(4)}"
    files = export(weights, staged, base, job.id, formats, noted)
    for item in files:
        check(item, base, weights)
    record = {
        "id": job.id, **noted, "loss": sum(last) / len(last), "base_fingerprint": base.fingerprint,
        "files": [item.name for item in files], "sha256": sha256_of(staged), **({"labels": labels} if labels else {}),
    }  # fmt: skip
    atomic.write_text(staged / RECORD, json.dumps(record, indent=1, default=str) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    if replace:
        shutil.rmtree(place, ignore_errors=True)
    try:
        os.rename(staged, place)  # onto a folder that is not empty this fails
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        raise FileExistsError(errno.EEXIST, "this adapter is exported already", str(place)) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    atomic.flush(folder)
    for item in files:
        item.path, item.folder = place / item.path.relative_to(staged), place
    return files


def check(item: Exported, base: Base, weights: AdapterWeights) -> None:
    """Compare a file with what was trained, as our own reader finds it.

    Raises:
        VerificationError: They differ by more than rounding.
    """
    found = read_adapter(item.path, base, force=True)
    for token, rows in found.tokens.items():
        wanted = weights.tokens[token] if item.encoder is None else [weights.tokens[token][item.encoder]]
        if not all(torch.equal(a, b) for a, b in zip(rows, wanted, strict=True)):
            raise VerificationError(f"{item.path}: the rows of {token} are not those that were trained")
    if found.low_rank and set(found.low_rank) != set(weights.low_rank):
        raise VerificationError(f"{item.path}: other layers than those that were trained")
    for layer, factors in found.low_rank.items():
        for part, own in zip(_scaled(factors), _scaled(weights.low_rank[layer]), strict=True):
            if not torch.allclose(part, own, rtol=TOLERANCE, atol=0):
                raise VerificationError(f"{item.path}: {layer} does not come back as it was trained")


def _scaled(factors: LowRank) -> tuple[Tensor, Tensor]:
    """A and s·B."""
    return factors.down, factors.up * (factors.alpha / factors.rank)
