"""Adapters as points of a subspace: members of its corpus by id, any LoRA of its layout by file."""

from __future__ import annotations

import difflib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_personalize.adapters.protocol import AdapterWeights, LowRank
from lit_personalize.backbones.base import Base
from lit_personalize.corpus.layout import Layout
from lit_personalize.errors import DataError
from lit_personalize.export.loading import LORA_FILES, exports_of, read_adapter, read_file
from lit_personalize.weights2weights.subspace import Subspace

if TYPE_CHECKING:
    from lit_personalize.corpus.store import Corpus

MEAN = "mean"
"""Names the mean adapter, which is where every coefficient is 0."""
STRANGE = 0.9
"""Share outside of the space above which reading a file warns of it."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """An adapter and what the space says of it."""

    name: str
    row: Tensor
    """θ `[D]`, as it is, not as the space has it."""
    coefficients: Tensor
    """β of its projection, `[k]`."""
    residual: float
    """Share of its length, in units of the corpus's deviations from the mean, that lies outside of the space."""


def point_of(space: Subspace, entry: str, base: Base, corpus: Corpus | None = None, force: bool = False) -> Point:
    """Read `mean`, an id of the space or of the corpus, or a LoRA's file, folder or run.

    Args:
        corpus: Gives the rows of its adapters whole; without it an id of the space is its projection.
        force: Accept a file that says it was made for another base.

    Raises:
        DataError: There is no such adapter; a file is of other layers or another rank, or began from another seed.
    """
    if entry == MEAN:
        return of_row(space, entry, space.mean)
    if corpus is not None and entry in corpus.ids:
        if corpus.layout != space.layout:
            raise DataError(f"the adapters of {corpus.folder} lie otherwise than those of the space: name its corpus")
        return of_row(space, entry, corpus.row(entry))
    if entry in space.ids:
        coefficients = space.coefficients[space.ids.index(entry)]
        return Point(entry, space.unproject(coefficients), coefficients, 0.0)
    path = Path(entry)
    if not path.exists():
        close = difflib.get_close_matches(entry, space.ids, 1)
        raise DataError(
            f"{entry} is neither an adapter of the space nor a file{f'; did you mean {close[0]}?' if close else ''} "
            "(of adapters that came later, name the --corpus)"
        )
    _refuse_other_start(space, exports_of(path))
    found = of_row(space, entry, row_of(space.layout, read_adapter(exports_of(path), base, force), entry))
    if found.residual > STRANGE:
        log.warning(
            "%s: %.0f %% of it lie outside of the space; an adapter that did not begin at the corpus's factors is "
            "strange to it", entry, 100 * found.residual,
        )  # fmt: skip
    return found


def of_row(space: Subspace, name: str, row: Tensor) -> Point:
    """A row `[D]` with its coefficients and its share outside of the space."""
    standard = (row.float() - space.mean) / space.deviation
    coefficients = standard @ space.components.T
    outside = standard - coefficients @ space.components
    size = float(standard.norm())
    return Point(name, row.float(), coefficients, float(outside.norm()) / size if size else 0.0)


def row_of(layout: Layout, weights: AdapterWeights, name: str) -> Tensor:
    """A LoRA as a row `[D]` of this layout; files with alpha multiplied into B count like those that say alpha.

    Raises:
        DataError: It has other layers, another rank, or more than LoRA factors.
    """
    low_rank = {}
    for layer, factors in weights.low_rank.items():
        alpha = layout.alphas.get(layer, factors.alpha)
        low_rank[layer] = LowRank(factors.down, factors.up * (factors.alpha / alpha), alpha)
    try:
        return layout.flatten(replace(weights, low_rank=low_rank))
    except DataError as error:
        raise DataError(f"{name}: {error}; the space holds LoRAs like those of its corpus") from error


def weights_of_row(space: Subspace, row: Tensor) -> AdapterWeights:
    """A row `[D]` as an adapter.

    Raises:
        DataError: It holds NaN or infinite values.
    """
    if not bool(torch.isfinite(row).all()):
        raise DataError("the adapter holds NaN or infinite values: go less far (--by, --spread)")
    return space.layout.unflatten(row)


def _refuse_other_start(space: Subspace, path: Path) -> None:
    """Refuse a file that says it began from another seed than the corpus: its numbers mean something else."""
    begun = space.details.get("init_seed")
    files = [path] if path.is_file() else [p for pattern in LORA_FILES for p in sorted(path.glob(pattern))]
    if begun is None or not files or files[0].suffix != ".safetensors":
        return
    try:
        details = json.loads(read_file(files[0])[1].get("litp.details", "{}"))
        own = details.get("init_seed", begun) if isinstance(details, dict) else begun
    except (ValueError, RecursionError):
        return  # details are free text to other programs
    if own != begun:
        raise DataError(
            f"{files[0]} began from initial seed {own}, the corpus from {begun}: their numbers cannot be compared; "
            f"train it again with init_seed: {begun}"
        )
