"""Write a merged adapter: export, verify through the stock client, and a report beside the files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lit_personalize import atomic
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.backbones.base import Base
from lit_personalize.errors import DataError, UsageError
from lit_personalize.export.exporter import FORMATS, export
from lit_personalize.export.verify import verify
from lit_personalize.merging.arithmetic import Energy

REPORT = "merge.json"


@dataclass
class MergeReport:
    """What a merge made and what it kept."""

    mode: str
    output: str
    adapters: list[dict[str, Any]]
    """Name, strength and changed layers of each input."""
    layers: int = 0
    ranks: dict[str, int] = field(default_factory=dict)
    """Layers by rank."""
    energy_kept: float = 1.0
    """Share of the exact merge's energy that the written rank has."""
    worst_layer: str = ""
    worst_kept: float = 1.0
    """The layer that keeps the smallest share."""
    tokens: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    """What only some modes have to say."""
    files: list[str] = field(default_factory=list)
    verified: dict[str, Any] | None = None
    """Largest relative error of a layer, and difference of a pixel, in the stock client."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, default=str) + "\n"


def check_output(output: Path, inputs: Sequence[Path], formats: Sequence[str]) -> None:
    """Refuse to mix files.

    Raises:
        UsageError: The folder holds something else than an earlier merge, is an input, or a format is unknown.
    """
    if unknown := [f for f in formats if f not in FORMATS]:
        raise UsageError(f"unknown export format {unknown[0]!r}; use {', '.join(FORMATS)}")
    if output.exists() and not output.is_dir():
        raise UsageError(f"output {output} is a file; name a folder")
    if any(output.resolve() in (path.resolve(), *path.resolve().parents) for path in inputs):
        raise UsageError(f"output {output} holds an adapter that is to be merged; name another folder")
    if output.is_dir() and any(output.iterdir()) and not (output / REPORT).is_file():
        raise UsageError(f"output {output} holds other files; name a new or empty folder")


def write_merged(
    weights: AdapterWeights,
    energy: Energy,
    report: MergeReport,
    base: Base,
    formats: Sequence[str] = ("diffusers", "kohya"),
    check: bool = True,
    prompt: str | None = None,
) -> MergeReport:
    """Write the adapter into `report.output`, verify every file, and fill in and write the report.

    Raises:
        VerificationError: A file does not give back what was merged.
    """
    output = Path(report.output)
    earlier = _files_of(output)
    report.layers = len(weights.layers())
    report.ranks = {str(k): n for k, n in sorted(Counter(f.rank for f in weights.low_rank.values()).items())}
    report.energy_kept = energy.share
    report.worst_layer, report.worst_kept = energy.worst
    report.tokens = sorted(weights.tokens)
    details = {"merge": report.mode, "of": [a["name"] for a in report.adapters], "energy_kept": energy.share}
    files = export(weights, output, base, output.name or report.mode, formats, details)
    report.files = [item.name for item in files]
    for old in earlier - {Path(name) for name in report.files}:
        (output / old).unlink(missing_ok=True)
    atomic.write_text(output / REPORT, report.to_json())  # also where verification fails: the folder is a merge's
    if check:
        found = verify(files, base, weights, prompt or "a photo of " + (" and ".join(weights.tokens) or "something"))
        report.verified = {
            "largest_error": max((f.largest_error for f in found.files), default=0.0),
            "picture_difference": found.picture_difference,
        }
    atomic.write_text(output / REPORT, report.to_json())
    return report


def _files_of(output: Path) -> set[Path]:
    """Files that an earlier merge wrote into the folder, relative to it."""
    if not (output / REPORT).is_file():
        return set()
    try:
        names = json.loads((output / REPORT).read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{output / REPORT} is damaged ({error}); name a new folder") from error
    inside = (name for name in map(Path, names) if not name.is_absolute() and ".." not in name.parts)
    return {name for name in inside if (output / name).is_file()}
