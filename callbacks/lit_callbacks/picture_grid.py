"""Lay pictures out with labels: rows are prompts, columns are training steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageDraw, ImageFont

from lit_personalize.sampling.grid import wrap

CELL = 256
"""Longest side of one picture in the grid, in pixels; larger ones are scaled down."""
GAP, LABEL, COLUMNS = 4, 180, 24
"""Pixels between cells, pixels for the prompts, and the most columns shown."""
INK, PAPER = (20, 20, 20), (255, 255, 255)
T = TypeVar("T")


def thin(columns: Sequence[T], most: int = COLUMNS) -> list[T]:
    """At most `most` columns, evenly spread, the first and the last among them."""
    if len(columns) <= most:
        return list(columns)
    return [columns[round(i * (len(columns) - 1) / (most - 1))] for i in range(most)]


def assemble(prompts: Sequence[str], per_cell: int, columns: Sequence[tuple[int, Sequence[Path]]]) -> Image.Image:
    """One picture of all columns.

    Args:
        prompts: Labels of the rows.
        per_cell: Pictures side by side in a cell.
        columns: Step and its pictures, row by row.
    """
    first = Image.open(columns[0][1][0])
    scale = min(1.0, CELL / max(first.size))
    width, height = (max(1, round(side * scale)) for side in first.size)
    font = ImageFont.load_default(size=12)
    head = 18
    cell = per_cell * (width + 1) + GAP
    row = max(height, 4 * 14) + GAP
    grid = Image.new("RGB", (LABEL + cell * len(columns), head + row * len(prompts)), PAPER)
    pen = ImageDraw.Draw(grid)
    for r, prompt in enumerate(prompts):
        pen.multiline_text((4, head + r * row), "\n".join(wrap(prompt, font, LABEL - 8, 4)), INK, font, spacing=2)
    for c, (step, paths) in enumerate(columns):
        left = LABEL + c * cell
        pen.text((left, 2), f"step {step}" if c == 0 else str(step), INK, font)
        for i, path in enumerate(paths):
            with Image.open(path) as opened:
                picture = opened.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
            grid.paste(picture, (left + (i % per_cell) * (width + 1), head + (i // per_cell) * row))
    return grid
