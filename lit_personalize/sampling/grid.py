"""Pictures in a grid: each with its prompt below it, or with labels of rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
GAP, LINE, LINES = 8, 12, 3
"""Pixels between pictures, pixels of a line of text, and the most lines below a picture."""
SMALLEST, LARGEST = 256, 512
"""Pixels of a picture's side in a labelled grid: smaller ones are enlarged, larger ones made smaller."""
Labels = Sequence[tuple[str, str]]
"""Of rows or columns, each (outer, inner); the outer one is written once for all neighbours that share it."""


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


def labelled_grid(pictures: np.ndarray, rows: Labels, columns: Labels) -> Image.Image:
    """Pictures uint8 `[rows, columns, H, W, 3]` with labels at the left and above; text grows with the pictures."""
    height, width = pictures.shape[2:4]
    scale = max(1.0, SMALLEST // max(height, width)) if max(height, width) < LARGEST else LARGEST / max(height, width)
    height, width = round(height * scale), round(width * scale)
    size = max(15, width // 18)
    font, line = ImageFont.load_default(size), round(1.3 * size)
    spans = [(label, len(list(same))) for label, same in groupby(outer for outer, _ in columns)]
    heads = [wrap(label, font, count * (width + GAP) - GAP, LINES) for label, count in spans]
    outer_lines, left = max(map(len, heads)), width * 3 // 4
    top = GAP + line * (outer_lines + any(inner for _, inner in columns)) + GAP // 2
    full = (left + len(columns) * (width + GAP) + GAP, top + len(rows) * (height + GAP))
    sheet = Image.new("RGB", full, "white")
    draw = ImageDraw.Draw(sheet)
    x = left + GAP
    for head, (_, count) in zip(heads, spans, strict=True):
        for n, words in enumerate(head):
            draw.text((x, GAP + line * n), words, fill="black", font=font)
        x += count * (width + GAP)
    for c, (_, inner) in enumerate(columns):
        draw.text((left + GAP + c * (width + GAP), GAP + line * outer_lines), inner, fill="black", font=font)
    before = None
    for r, (outer, inner) in enumerate(rows):
        y = top + r * (height + GAP)
        said = wrap(outer, font, left - GAP, height // line - 2) if outer != before else []
        for n, words in enumerate([*said, inner]):
            draw.text((GAP, y + line * n), words, fill="black", font=font)
        before = outer
        for c in range(len(columns)):
            picture = Image.fromarray(pictures[r, c])
            how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
            sheet.paste(picture.resize((width, height), how), (left + GAP + c * (width + GAP), y))
    return sheet
