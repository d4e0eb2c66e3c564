"""`lit_personalize.merge`: adapter files in, one verified adapter out; the verb `litp merge` in Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.merging.arithmetic import MergeOptions, Mode, check, combine
from lit_personalize.merging.sources import BlockStrength, Source, read_sources, tokens_of, weight_shapes
from lit_personalize.merging.writing import MergeReport, check_output, write_merged

Given = str | Path | tuple[str | Path, float]


def merge(
    mode: Mode,
    adapters: Sequence[Given],
    output: str | Path,
    base: str | Base = "tinyworld",
    *,
    blocks: Sequence[str] = (),
    renames: Mapping[tuple[int, str], str] | None = None,
    formats: Sequence[str] = ("diffusers", "kohya"),
    verify: bool = True,
    force: bool = False,
    prompt: str | None = None,
    **options: Any,
) -> MergeReport:
    """Merge adapter files into one adapter, and verify it through the stock client.

    Args:
        mode: linear, concat, svd, ties, dare, magnitude, orthogonal or magmax.
        adapters: Files, folders or runs, or (path, strength).
        output: Folder for the files and merge.json; new, empty, or of an earlier merge.
        blocks: Strengths of layers, `[N:]PATTERN=FACTOR`; see `BlockStrength`.
        renames: (number of the adapter from 1, token) -> new name, for tokens that two adapters have.
        force: Accept files that were made for another base, if shapes fit.
        options: Of `MergeOptions`: rank or energy, density, sign, elect, on, seed, protect.

    Raises:
        UsageError: Too few adapters, or options that do not fit.
        DataError: An adapter is missing, damaged, or of another base; a token is in two adapters.
        VerificationError: A written file does not give back the merge.
    """
    given = paths_and_strengths(adapters)
    how = MergeOptions(**options)
    check(mode, len(given), how)
    patterns = [BlockStrength.parse(text) for text in blocks]
    check_output(Path(output), [path for path, _ in given], formats)
    built = base if isinstance(base, Base) else load_base(base)
    sources = read_sources(given, built, patterns, renames, force)
    tokens = tokens_of(sources)
    found = combine(mode, sources, weight_shapes(built), how)
    found.weights.tokens = tokens
    defaults = asdict(MergeOptions())
    report = MergeReport(mode, str(output), described(sources))
    report.options = {key: value for key, value in asdict(how).items() if value != defaults[key]}
    report.options |= {"blocks": list(blocks)} if blocks else {}
    for adapter, left in zip(report.adapters, found.left or (), strict=False):
        adapter["left"] = left
    return write_merged(found.weights, found.energy, report, built, formats, verify, prompt)


def paths_and_strengths(adapters: Sequence[Given]) -> list[tuple[Path, float]]:
    """Every adapter as path and strength; 1 where none is given."""
    return [(Path(a[0]), float(a[1])) if isinstance(a, tuple) else (Path(a), 1.0) for a in adapters]


def described(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Inputs for the report."""
    return [{"name": s.name, "strength": s.strength, "layers": len(s.layers())} for s in sources]
