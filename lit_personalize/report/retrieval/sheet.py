"""What a search put first, in a picture: one row per query and way of asking."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from lit_personalize.sampling.grid import captioned_grid
from lit_personalize.tinyworld.dataset import read_tar
from lit_personalize.tinyworld.paraphrases import Facts

COLUMNS, SIDE, BORDER = 12, 64, 3
WRONG = (220, 0, 0)


class Found(Protocol):
    """A pair of the corpus."""

    @property
    def shard(self) -> Path: ...
    @property
    def key(self) -> str: ...
    @property
    def caption(self) -> str: ...
    @property
    def facts(self) -> Facts: ...


@dataclass(frozen=True)
class Shown:
    """A row: how it was asked, what makes a picture relevant, what came, and the folder of pictures that asked."""

    title: str
    wanted: Facts
    found: Sequence[Found]
    asked: Path | None = None


def sheet(rows: Sequence[Shown]) -> Image.Image:
    """The first twelve of every row with their captions; red frames are pictures that do not show what was asked."""
    needed: dict[Path, set[str]] = {}
    for row in rows:
        for pair in row.found[:COLUMNS]:
            needed.setdefault(pair.shard, set()).add(pair.key)
    pixels = {}
    for shard, keys in needed.items():
        for key, members in read_tar(shard):
            if key in keys:
                pixels[shard, key] = np.array(Image.open(io.BytesIO(members["jpg"])).convert("RGB"))
    tiles, captions = [], []
    for row in rows:
        tiles.append(_together(sorted(row.asked.glob("*.png")) if row.asked else []))
        captions.append(row.title)
        for pair in row.found[:COLUMNS]:
            tile = pixels[pair.shard, pair.key].copy()
            tiles.append(tile if row.wanted <= pair.facts else _framed(tile))
            captions.append(pair.caption)
        for _ in range(COLUMNS - len(row.found)):
            tiles.append(_blank())
            captions.append("")
    return captioned_grid(np.stack(tiles), captions, COLUMNS + 1)


def _together(pictures: Sequence[Path]) -> np.ndarray:
    """One picture as it is, up to four small ones in a square."""
    if len(pictures) == 1:
        return np.array(Image.open(pictures[0]))
    tile, half = Image.fromarray(_blank()), SIDE // 2
    for i, picture in enumerate(pictures[:4]):
        tile.paste(Image.open(picture).resize((half, half)), (i % 2 * half, i // 2 * half))
    return np.array(tile)


def _blank() -> np.ndarray:
    return np.full((SIDE, SIDE, 3), 255, np.uint8)


def _framed(tile: np.ndarray) -> np.ndarray:
    inner = tile[BORDER:-BORDER, BORDER:-BORDER].copy()
    tile[:] = WRONG
    tile[BORDER:-BORDER, BORDER:-BORDER] = inner
    return tile
