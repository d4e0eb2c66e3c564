"""A point as files: LoRA files that stock clients load, reloaded through one, and `w2w.json` with its coefficients."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_personalize import atomic
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.backbones.base import Base
from lit_personalize.errors import DataError, UsageError
from lit_personalize.export.exporter import FORMATS, export
from lit_personalize.export.verify import verify
from lit_personalize.weights2weights.subspace import Subspace

RECORD = "w2w.json"


def refuse_base(space: Subspace, base: Base, force: bool = False) -> None:
    """Compare a base with that of the corpus.

    Raises:
        DataError: It is another one.
    """
    made_for = space.details.get("base_fingerprint", base.fingerprint)
    if made_for != base.fingerprint and not force:
        raise DataError(
            f"the space is of adapters of base {made_for}, this is {base.source} ({base.fingerprint}): name that base "
            "with --base, or, for a copy of it in another precision, add --force"
        )


def refuse_output(folder: Path, formats: Sequence[str]) -> None:
    """Refuse to mix files.

    Raises:
        UsageError: The folder holds something else than an earlier result, or a format is unknown.
    """
    if unknown := [f for f in formats if f not in FORMATS]:
        raise UsageError(f"unknown export format {unknown[0]!r}; use {', '.join(FORMATS)}")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output {folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise UsageError(f"output {folder} holds other files; name a new or empty folder")


def write(
    weights: AdapterWeights,
    coefficients: Tensor,
    folder: Path,
    space: Subspace,
    base: Base,
    told: Mapping[str, Any],
    formats: Sequence[str] = ("diffusers",),
    check: bool = True,
) -> dict[str, Any]:
    """Write an adapter into `folder`, and verify its files.

    Args:
        coefficients: β `[j]` of the adapter.
        told: What made it: for the files' metadata and the record.

    Returns:
        The record, with the files' names and the largest relative error in the stock client (None without `check`).

    Raises:
        UsageError: See `refuse_output`.
        VerificationError: A file does not give back the adapter.
    """
    refuse_output(folder, formats)
    details = {"init_seed": space.details.get("init_seed"), **told}
    files = export(weights, folder, base, folder.name or "w2w", formats, details)
    record = {**told, "files": [item.name for item in files], "verified": None}
    whole = {**record, "coefficients": coefficients.tolist()}
    atomic.write_text(folder / RECORD, json.dumps(whole, default=str) + "\n")  # the folder is ours from now on
    if check:
        found = verify(files, base, weights)
        record["verified"] = whole["verified"] = max((f.largest_error for f in found.files), default=0.0)
        atomic.write_text(folder / RECORD, json.dumps(whole, default=str) + "\n")
    return record
