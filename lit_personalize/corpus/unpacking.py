"""Adapters of a corpus as files that stock clients load, verified."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_personalize.backbones.base import Base
from lit_personalize.corpus.store import Corpus
from lit_personalize.errors import DataError, UsageError
from lit_personalize.export.exporter import export, file_stem
from lit_personalize.export.verify import verify

KNOWN = ("seed", "init_seed", "loss", "steps", "recipe")


def write_adapters(
    corpus: Corpus, ids: Sequence[str], folder: Path, base: Base, formats: Sequence[str] = ("diffusers",)
) -> dict[str, Any]:
    """Write every adapter into `folder/<id>`, and load each file into the stock client; gives the report.

    Metadata have what the corpus knows of the adapter, and the relative error by which rounding changed it.

    Raises:
        DataError: No such adapter, a damaged one, or another base.
        UsageError: A format is unknown, or a folder is there already.
        VerificationError: A file does not give back the row.
    """
    if base.fingerprint != corpus.base_fingerprint:
        raise DataError(
            f"{corpus.folder} holds adapters of base {corpus.base_fingerprint}, this is {base.source} "
            f"({base.fingerprint}): name theirs with --base"
        )
    report: dict[str, Any] = {"adapters": {}, "largest_error": 0.0, "rounding_error": 0.0}
    for name in ids:
        weights = corpus.adapter(name)
        line = corpus.line(name)
        place, staged = folder / file_stem(name), folder / f".tmp-{file_stem(name)}"
        if place.exists():
            raise UsageError(f"{place} is there already: remove it, or name another --out")
        details = {key: line[key] for key in KNOWN if line[key] is not None}
        details |= {"corpus": corpus.fingerprint, "rounding_error": line["error"]}
        try:
            files = export(weights, staged, base, name, formats, details)
            verified = verify(files, base, weights)
            staged.rename(place)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        report["adapters"][name] = [str(place / item.name) for item in files]
        report["largest_error"] = max(report["largest_error"], *(f.largest_error for f in verified.files))
        report["rounding_error"] = max(report["rounding_error"], line["error"])
    return report
