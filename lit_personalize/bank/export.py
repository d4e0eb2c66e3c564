"""A finished adapter as files that stock clients load: a folder that is whole, or not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lit_personalize import atomic
from lit_personalize.adapters.protocol import AdapterWeights, LowRank
from lit_personalize.backbones.base import Base
from lit_personalize.bank.engine import Bank
from lit_personalize.bank.job import FinishedAdapter
from lit_personalize.errors import UsageError, VerificationError
from lit_personalize.export.exporter import Exported, export, file_stem
from lit_personalize.export.loading import read_adapter

RECORD = "adapter.json"
TOLERANCE = 1e-6
LAST = 10
"""Steps whose mean loss is noted."""


def is_exported(folder: Path, name: str) -> bool:
    """Whether a whole adapter of that id is in the folder."""
    return (folder / name / RECORD).is_file()


def write(
    finished: FinishedAdapter,
    folder: Path,
    bank: Bank,
    formats: Sequence[str] = ("diffusers",),
    details: Mapping[str, object] | None = None,
) -> list[Exported]:
    """Write the files of an adapter and `adapter.json` into `folder/<id>`, and read them back.

    An earlier one of the same id is replaced. Metadata and record have seed, initial seed, steps and skipped steps.

    Raises:
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
    place, staged = folder / job.id, folder / f".tmp-{job.id}"
    shutil.rmtree(staged, ignore_errors=True)
    files = export(weights, staged, base, job.id, formats, noted)
    for item in files:
        check(item, base, weights)
    record = {
        "id": job.id, **noted, "loss": sum(last) / len(last), "base_fingerprint": base.fingerprint,
        "files": [item.name for item in files],
    }  # fmt: skip
    atomic.write_text(staged / RECORD, json.dumps(record, indent=1, default=str) + "\n")
    shutil.rmtree(place, ignore_errors=True)
    os.rename(staged, place)
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
