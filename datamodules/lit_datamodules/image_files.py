"""Read pictures as people have them: any mode, rotated by EXIF, with alpha, 16 bits deep."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lit_datamodules.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def list_images(folder: Path) -> list[Path]:
    """Picture files of a folder in natural order ("2.jpg" before "10.jpg").

    Raises:
        DataError: The folder is missing or holds no picture.
    """
    if not folder.is_dir():
        raise DataError(f"image folder {folder} does not exist; give a folder with jpg, png or webp files")
    found = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
    if not found:
        raise DataError(f"image folder {folder} holds no jpg, png or webp file")
    return sorted(found, key=lambda p: [int(s) if s.isdigit() else s.lower() for s in re.split(r"(\d+)", p.name)])


def to_rgb(image: Image.Image) -> np.ndarray:
    """uint8 `[H, W, 3]` of any PIL image: upright, over white where it is transparent, 16 bits scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":  # 16-bit grey; PIL's own conversion clips at 255
        deep = np.asarray(image, dtype=np.float64)
        scale = 257.0 if deep.max() > 255 else 1.0
        image = Image.fromarray((deep / scale).round().clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        image = Image.fromarray(np.asarray(image).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def read_image(path: Path) -> np.ndarray:
    """Read one file as uint8 `[H, W, 3]`.

    Raises:
        DataError: The file is damaged or cut off.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read picture {path}: {error}; replace or remove the file") from error
