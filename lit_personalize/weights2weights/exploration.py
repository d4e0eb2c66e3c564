"""What a page of a space shows: coefficients small enough for a browser, labels, directions, pictures along them."""

from __future__ import annotations

import base64
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_personalize.adapters.loaded import LoadedAdapter
from lit_personalize.backbones.base import Base
from lit_personalize.errors import DataError
from lit_personalize.sampling.sampler import SamplingOptions, generate
from lit_personalize.weights2weights.directions import Direction, Method, find
from lit_personalize.weights2weights.points import Point, weights_of_row
from lit_personalize.weights2weights.subspace import Subspace

UNKNOWN = 255
"""Of a label's bytes: there is none."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Strip:
    """Pictures along a direction."""

    name: str
    steps: Sequence[float]
    """α of each picture."""
    pictures: np.ndarray
    """uint8 `[len(steps), H, W, 3]`."""


@dataclass
class Exploration:
    """All that the page shows."""

    space: Subspace
    labels: Mapping[str, Tensor]
    directions: Sequence[Direction]
    strips: Sequence[Strip] = ()
    told: Mapping[str, Any] = field(default_factory=dict)
    """Of the strips: adapter, prompt, seed."""
    thumbnails: Mapping[str, Path] = field(default_factory=dict)
    """Id -> picture."""

    @property
    def along(self) -> Tensor:
        """Where the adapters stand along each direction, in deviations of the corpus, `[n, directions]`."""
        beta = self.space.coefficients
        columns = [beta[:, : len(d.vector)] @ d.vector / (d.deviation or 1.0) for d in self.directions]
        return torch.stack(columns, 1) if columns else beta[:, :0]

    @property
    def shares(self) -> list[float]:
        """Of the corpus's variance, of every component; of that of all components where the corpus's is not known."""
        total = float(self.space.details.get("total_variance") or self.space.variances.sum())
        return [float(v) / total for v in self.space.variances]


def directions_of(
    space: Subspace,
    labels: Mapping[str, Tensor],
    method: Method = "logistic",
    components: int | None = None,
    folds: int = 5,
) -> list[Direction]:
    """The direction of every label that has one, best first; the others are warned of."""
    found = []
    for name, values in labels.items():
        try:
            found.append(find(space.coefficients, values, name, method, components, folds))
        except DataError as error:
            log.warning("no direction: %s", error)
    return sorted(found, key=lambda d: (not d.classes, -(0 if math.isnan(d.held_out) else d.held_out)))


def draw_strip(
    space: Subspace,
    base: Base,
    point: Point,
    direction: Direction,
    steps: Sequence[float],
    prompt: str,
    seed: int = 0,
    options: SamplingOptions | None = None,
) -> Strip:
    """Draw an adapter at several places along a direction, with the same noise."""
    drawn = []
    adapter: LoadedAdapter | None = None
    for by in steps:
        weights = weights_of_row(space, point.row + direction.step(space, by))
        if adapter is None:
            adapter = LoadedAdapter(weights, f"along {direction.name}")
            adapter.attach(base)
        adapter.weights = weights  # of the same layers: the next refresh puts them in place
        drawn.append(generate(base, [prompt], [seed], [adapter], options)[0])
    return Strip(direction.name, list(steps), np.stack(drawn))


def quantised(coefficients: Tensor) -> dict[str, Any]:
    """Numbers `[n, c]` as little-endian int16 in base64, row by row, and by column what one unit is."""
    scales = coefficients.abs().amax(dim=0).clamp(min=1e-30) / 32767
    units = torch.round(coefficients / scales).to(torch.int16).numpy().astype("<i2")
    return {"packed": base64.b64encode(units.tobytes()).decode(), "scales": [float(s) for s in scales]}


def label_bytes(values: Tensor, classes: bool) -> dict[str, Any]:
    """A label as a byte for every adapter, 255 where there is none: 0 and 1, or 0 to 254 between the extremes."""
    known = torch.isfinite(values)
    if classes:
        low, high, units = 0.0, 1.0, (values > 0).float()
    else:
        low, high = (float(values[known].min()), float(values[known].max())) if bool(known.any()) else (0.0, 1.0)
        units = (torch.nan_to_num(values, nan=low) - low) / ((high - low) or 1.0) * (UNKNOWN - 1)
    units = torch.where(known, units.round(), float(UNKNOWN)).to(torch.uint8)
    data = base64.b64encode(units.numpy().tobytes()).decode()
    return {"classes": classes, "low": low, "high": high, "values": data}


def thumbnails_in(folder: Path, ids: Sequence[str]) -> dict[str, Path]:
    """For each adapter `ID.png` (jpg, webp), or the first picture of the folder `ID/`, where there is one.

    Raises:
        DataError: The folder is missing, or has none at all.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: name one with ID.png or ID/ for the adapters")
    found = {}
    for name in ids:
        single = [path for suffix in SUFFIXES if (path := folder / f"{name}{suffix}").is_file()]
        inside = sorted(p for p in (folder / name).glob("*") if p.suffix.lower() in SUFFIXES) if not single else []
        if single or inside:
            found[name] = (single or inside)[0]
    if not found:
        raise DataError(f"{folder} has no picture ID.png or ID/*.png of any adapter, such as {ids[0]}.png")
    return found
