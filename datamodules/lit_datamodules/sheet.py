"""`sheet.png`: the crops and captions that the model really sees."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont


@dataclass(frozen=True)
class Tile:
    """A view `[3, H, W]` in [-1, 1], its caption, a note, and its latent mask `[1, h, w]` or None."""

    view: np.ndarray
    caption: str
    note: str
    mask: np.ndarray | None = None


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def wrap(text: str, draw: ImageDraw.ImageDraw, font: Font, width: int) -> list[str]:
    """Break text into lines no wider than `width` pixels."""
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and draw.textlength(longer, font) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    return [*lines, line]


def write_sheet(rows: dict[str, list[Tile]], path: Path, side: int = 128, columns: int = 8) -> None:
    """Write one titled block per row name; cells outside a mask are shaded."""
    font = ImageFont.load_default(11)
    cell_h, gap, title = side + 58, 8, 22
    height = sum(title + cell_h * -(-len(tiles) // columns) for tiles in rows.values()) + gap
    sheet = Image.new("RGB", (columns * (side + gap) + gap, height), "white")
    draw = ImageDraw.Draw(sheet)
    y = gap // 2
    for name, tiles in rows.items():
        draw.text((gap, y), name, fill="black", font=ImageFont.load_default(14))
        y += title
        for i, tile in enumerate(tiles):
            x, top = gap + (i % columns) * (side + gap), y + (i // columns) * cell_h
            pixels = ((tile.view.transpose(1, 2, 0) + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
            image = Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)
            if tile.mask is not None and tile.mask.min() < 1:
                shade = Image.fromarray(((1 - tile.mask[0]) * 110).astype(np.uint8))
                outside = shade.resize((side, side), Image.Resampling.NEAREST)
                image.paste(Image.new("RGB", image.size, (214, 40, 40)), mask=outside)
            sheet.paste(image, (x, top))
            lines = [*wrap(tile.caption, draw, font, side)[:3], tile.note]
            for n, line in enumerate(lines):
                draw.text((x, top + side + 1 + 13 * n), line, fill="black" if n < len(lines) - 1 else "gray", font=font)
        y += cell_h * -(-len(tiles) // columns)
    sheet.save(path)
