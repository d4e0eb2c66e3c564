"""Pictures of the matrix's first seed on one sheet: a column per thing that is learned, a row per method or way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lit_personalize.report.combinations import COMBINATIONS, WAYS
from lit_personalize.report.science import METHODS, SEEDS, STYLE_METHODS, cell_id
from lit_personalize.sampling.grid import captioned_grid
from lit_personalize.tinyworld.concepts import SUBJECTS_FOR_SCIENCE
from lit_personalize.tinyworld.style_concepts import STYLES_FOR_SCIENCE

SIDE = 64
REFERENCES = ("real picture", "untouched base")
"""What stands beside a method's picture in its cell's file, and before those of ways of combining."""
SHEETS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "pictures": (SUBJECTS_FOR_SCIENCE, tuple(METHODS)), "styles": (STYLES_FOR_SCIENCE, STYLE_METHODS),
}  # fmt: skip


def sheets(science: Path, fingerprint: str) -> dict[str, Image.Image]:
    """Every sheet that has a picture, by its file's name without suffix; missing tiles are gray."""
    found = {name: _by_method(science, fingerprint, *of) for name, of in SHEETS.items()}
    found |= {kind.replace(" ", "_"): _by_way(science, fingerprint, kind) for kind in COMBINATIONS}
    return {name: sheet for name, sheet in found.items() if sheet is not None}


def _by_method(science: Path, fingerprint: str, learned: Sequence[str], methods: Sequence[str]) -> Image.Image | None:
    columns = []
    for name in learned:
        strips = {method: _strip(science, cell_id(method, name, SEEDS[0], fingerprint)) for method in methods}
        shown = {method: strip for method, strip in strips.items() if strip is not None}
        first = next(iter(shown.values()), None)
        tiles = {} if first is None else {REFERENCES[0]: _tile(first, 1), REFERENCES[1]: _tile(first, 2)}
        columns.append(tiles | {method: _tile(strip, 0) for method, strip in shown.items()})
    return _grid(columns, (*REFERENCES, *methods))


def _by_way(science: Path, fingerprint: str, kind: str) -> Image.Image | None:
    columns, rows = [], (*REFERENCES, *WAYS[kind])
    for name in COMBINATIONS[kind]:
        strip = _strip(science, cell_id(kind, name, SEEDS[0], fingerprint))
        columns.append({} if strip is None else {row: _tile(strip, place) for place, row in enumerate(rows)})
    return _grid(columns, rows)


def _strip(science: Path, cell: str) -> np.ndarray | None:
    path = science / f"{cell}.png"
    if not path.exists():
        return None
    with Image.open(path) as strip:
        return np.asarray(strip)


def _tile(strip: np.ndarray, place: int) -> np.ndarray:
    return strip[:, SIDE * place : SIDE * (place + 1)]


def _grid(columns: Sequence[Mapping[str, np.ndarray]], rows: Sequence[str]) -> Image.Image | None:
    if not any(columns):
        return None
    blank = np.full((SIDE, SIDE, 3), 128, np.uint8)
    tiles = np.stack([column.get(row, blank) for row in rows for column in columns])
    return captioned_grid(tiles, [row for row in rows for _ in columns], len(columns))
