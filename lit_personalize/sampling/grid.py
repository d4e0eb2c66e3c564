"""Pictures in a grid, each with its prompt below it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
GAP, LINE, LINES = 8, 12, 3
"""Pixels between pictures, pixels of a line of text, and the most lines below a picture."""


def wrap(text: str, font: Font, width: float, most: int) -> list[str]:
    """Break text between words into at most `most` lines no wider than `width` pixels.

    A single word may be wider. What does not fit into the last line is left out, and an ellipsis says so.
    """
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(f"{last}…") > width:
        last = last[:-1].rstrip()
    return [*lines[: most - 1], f"{last}…"]


def captioned_grid(pictures: np.ndarray, captions: Sequence[str], columns: int = 8, zoom: int = 2) -> Image.Image:
    """Pictures uint8 `[N, H, W, 3]`, enlarged by `zoom`, row by row with their captions wrapped below them."""
    height, width = (side * zoom for side in pictures.shape[1:3])
    text = LINE * LINES + GAP
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + text) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for i, (pixels, words) in enumerate(zip(pictures, captions, strict=True)):
        x, y = GAP + (i % columns) * (width + GAP), GAP + (i // columns) * (height + text)
        sheet.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), (x, y))
        for n, line in enumerate(wrap(words, font, width, LINES)):
            draw.text((x, y + height + 1 + LINE * n), line, fill="black", font=font)
    return sheet
