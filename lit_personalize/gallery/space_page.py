"""One page of a space of adapters: scatter, directions with pictures along them, nearest adapters; in one file."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from lit_personalize.errors import DataError
from lit_personalize.gallery.pages import write_page
from lit_personalize.weights2weights.exploration import Exploration, label_bytes, quantised

THUMBNAIL = 96
"""Pixels of the longer side of an adapter's picture."""
LARGEST = 384
"""Likewise of a picture in a strip."""
SCREE = 40
"""Components whose shares are drawn as bars."""


def write_space(made: Exploration, path: Path, title: str, components: int = 32) -> Path:
    """Write the page with all that it shows in it.

    Args:
        components: That the page knows: what it can show, and by which it compares.

    Raises:
        DataError: A thumbnail cannot be read.
    """
    space = made.space
    count = min(components, len(space))
    classes = {d.name: d.classes for d in made.directions}
    thumbnails = {name: _thumbnail(picture) for name, picture in made.thumbnails.items()}
    payload = {
        "ids": space.ids, "components": count, "shares": made.shares[:count],
        "coefficients": quantised(space.coefficients[:, :count]), "along": quantised(made.along),
        "labels": {name: label_bytes(values, classes.get(name, False)) for name, values in made.labels.items()},
        "directions": {
            d.name: [float(x) * d.deviation for x in d.vector[:count]] for d in made.directions
        },
        "thumbnails": [thumbnails.get(name) for name in space.ids] if thumbnails else [],
    }  # fmt: skip
    shares = made.shares
    strips = {
        strip.name: [
            (_number(by), _uri(pixels), max(pixels.shape[:2]))
            for by, pixels in zip(strip.steps, strip.pictures, strict=True)
        ]
        for strip in made.strips
    }
    return write_page(
        path, "space.html", title=title, made=made, payload=json.dumps(payload, separators=(",", ":")), strips=strips,
        count=count, explained=sum(shares[:count]), bars=_bars(shares[:SCREE]), shown=min(len(shares), SCREE),
        whole="total_variance" in space.details, number=_number, percent=_percent, nan=math.isnan,
        thumbnails=len(thumbnails),
    )  # fmt: skip


def _bars(shares: list[float]) -> list[tuple[float, float]]:
    """Place and height of each bar, in a picture of 100 x 30."""
    highest, width = max(shares), 100 / len(shares)
    return [(round(i * width, 3), round(30 * share / highest, 3)) for i, share in enumerate(shares)]


def _number(value: float) -> str:
    """With a true minus and a plus: +1.5, −1.5, 0."""
    return f"{value:+g}".replace("-", "−") if value else "0"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _uri(pixels: np.ndarray) -> str:
    picture = Image.fromarray(pixels)
    buffer = io.BytesIO()
    if max(picture.size) > LARGEST:
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        picture.save(buffer, "JPEG", quality=88)
        return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    picture.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _thumbnail(path: Path) -> str:
    """A picture as a small data URI.

    Raises:
        DataError: It cannot be read.
    """
    buffer = io.BytesIO()
    try:
        with Image.open(path) as opened:
            small = opened.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as a picture ({error}): mend it, or take it away") from error
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def figures_of(made: Exploration) -> list[dict[str, Any]]:
    """The directions as records."""
    return [
        {
            "name": d.name, "classes": d.classes, "method": d.method, "components": len(d.vector),
            "held_out": None if math.isnan(d.held_out) else d.held_out, "counts": list(d.counts),
            "deviation": d.deviation,
        }
        for d in made.directions
    ]  # fmt: skip
