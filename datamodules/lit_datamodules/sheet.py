"""`sheet.png`: the crops and captions that the model really sees."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 10
LINE = 15
INK, FAINT, PAPER, SHADE = (20, 20, 24), (110, 110, 120), (255, 255, 255), (214, 40, 40)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Tile:
    """A view fp32 `[3, H, W]` in [-1, 1], its caption, a note, and its mask `[1, h, w]` where part is masked."""

    view: np.ndarray
    caption: str
    note: str = ""
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class Section:
    """Tiles of one kind under a title and a line that explains them."""

    title: str
    explanation: str
    tiles: Sequence[Tile]


def wrap(text: str, font: Font, width: int, most: int = 4) -> list[str]:
    """Break text into at most `most` lines no wider than `width` pixels; what does not fit ends in an ellipsis."""
    lines: list[str] = [""]
    for word in text.split():
        while font.getlength(word) > width:  # a word wider than the column
            cut = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines += [word[:cut], ""] if lines[-1] else []
            lines[-1:] = [lines[-1] or word[:cut], ""]
            word = word[cut:]
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    lines = [line for line in lines if line]
    if len(lines) > most:
        last = lines[most - 1]
        while last and font.getlength(last + " …") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], last + " …"]
    return lines


def write_sheet(sections: Sequence[Section], path: Path, side: int = 160, columns: int = 6) -> None:
    """Draw the sections below one another into a PNG; cells outside a mask are shaded red."""
    title_font, font = ImageFont.load_default(18), ImageFont.load_default(12)
    blocks = [_section(section, side, columns, title_font, font) for section in sections]
    width = columns * (side + GAP) + GAP
    page = Image.new("RGB", (width, sum(block.height for block in blocks) + GAP), PAPER)
    y = 0
    for block in blocks:
        page.paste(block, (0, y))
        y += block.height
    _write_png(page, Path(path))


def _section(section: Section, side: int, columns: int, title_font: Font, font: Font) -> Image.Image:
    width = columns * (side + GAP) + GAP
    rows = [section.tiles[i : i + columns] for i in range(0, len(section.tiles), columns)]
    captions = [[wrap(tile.caption, font, side) for tile in row] for row in rows]
    # A row is as high as its longest caption, with a line for the note.
    heights = [side + LINE * (max(map(len, row)) + 1) + GAP for row in captions]
    explanation = wrap(section.explanation, font, width - 2 * GAP)
    head = GAP + 26 + LINE * len(explanation) + 6
    block = Image.new("RGB", (width, head + sum(heights)), PAPER)
    draw = ImageDraw.Draw(block)
    draw.line([(GAP, GAP // 2), (width - GAP, GAP // 2)], fill=(200, 200, 206))
    draw.text((GAP, GAP), "".join(wrap(section.title, title_font, width - 2 * GAP, 1)), fill=INK, font=title_font)
    for n, line in enumerate(explanation):
        draw.text((GAP, GAP + 26 + LINE * n), line, fill=FAINT, font=font)
    y = head
    for row, lines_of_row, height in zip(rows, captions, heights, strict=True):
        for column, (tile, lines) in enumerate(zip(row, lines_of_row, strict=True)):
            x = GAP + column * (side + GAP)
            picture = _picture(tile, side)
            block.paste(picture, (x + (side - picture.width) // 2, y + (side - picture.height) // 2))
            draw.rectangle([(x - 1, y - 1), (x + side, y + side)], outline=(200, 200, 206))
            for n, line in enumerate(lines):
                draw.text((x, y + side + 2 + LINE * n), line, fill=INK, font=font)
            note = "".join(wrap(tile.note, font, side, 1))
            draw.text((x, y + side + 2 + LINE * len(lines)), note, fill=FAINT, font=font)
        y += height
    return block


def _picture(tile: Tile, side: int) -> Image.Image:
    pixels = np.rint((tile.view.transpose(1, 2, 0) + 1) * 127.5).clip(0, 255).astype(np.uint8)
    # Small pictures stay what they are, pixel by pixel.
    grow = Image.Resampling.NEAREST if max(pixels.shape) <= side // 2 else Image.Resampling.LANCZOS
    height, width = (max(1, round(side * n / max(pixels.shape))) for n in pixels.shape[:2])
    image = Image.fromarray(pixels).resize((width, height), grow)
    if tile.mask is not None and tile.mask.min() < 1:
        shade = Image.fromarray(np.rint((1 - tile.mask[0]) * 110).astype(np.uint8))
        image.paste(Image.new("RGB", image.size, SHADE), mask=shade.resize(image.size, Image.Resampling.NEAREST))
    return image


def _write_png(page: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        temporary.write_bytes(buffer.getvalue())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a full disk is noticed while writing, where no name is known
        raise
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
