"""Read pictures as people have them: any mode, rotated by EXIF, with alpha, 16 bits deep, in any colour space."""

from __future__ import annotations

import io
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from lit_datamodules.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")
# What Pillow's decoders raise for damaged files.
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


NARROWEST = 50
"""The longer side over the shorter one, of anything that may be a picture."""


@dataclass(frozen=True)
class Picture:
    """A decoded picture, upright: `pixels` uint8 `[H, W, 3]` in sRGB, composited over white where transparent."""

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    """uint8 `[H, W]`, where the file has transparency."""
    mode: str = "RGB"
    """As stored: Pillow's name, with "rotated" or "profile" where those were applied."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[0], self.pixels.shape[1]


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which "2.jpg" comes before "10.jpg"."""
    parts = re.split(r"(\d+)", name.lower())
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts] + [(2, 0, name)]


def list_images(folder: Path) -> list[Path]:
    """Picture files of a folder in natural order; hidden files are left out.

    Raises:
        DataError: The folder is missing or holds no picture.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DataError(f"image folder {folder} {what}; give a folder with jpg, png or webp files")
    found = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file() and not p.name.startswith(".")]
    if not found:
        raise DataError(f"image folder {folder} holds no jpg, png or webp file; put the pictures directly into it")
    return sorted(found, key=lambda p: natural_key(p.name))


def read_image(path: Path) -> Picture:
    """Read one file.

    Raises:
        DataError: The file cannot be read, is damaged or cut off.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read picture {path}: {error.strerror}; check the file and its permissions") from error
    return decode_image(data, str(path))


def decode_image(data: bytes, name: str) -> Picture:
    """Decode the bytes of a picture file; `name` is for the message.

    Raises:
        DataError: The bytes are no picture, damaged or cut off.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_sides(image)
            image.load()
            return to_picture(image)
    except Image.UnidentifiedImageError as error:
        raise DataError(f"{name} is no jpg, png or webp picture; replace or remove the file") from error
    except DAMAGE as error:
        raise DataError(f"cannot read picture {name}: {error}; replace or remove the file") from error


def _check_sides(image: Image.Image) -> None:
    """Refuse a strip of pixels; pictures of too many pixels are refused by Pillow as they are opened."""
    if max(image.size) > NARROWEST * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels is a strip and no picture")


def to_picture(image: Image.Image) -> Picture:
    """Bring any Pillow image to the form that training uses; of an animation the first frame."""
    mode = image.mode
    upright = ImageOps.exif_transpose(image)
    if upright.size != image.size or image.getexif().get(0x0112, 1) != 1:
        mode += " rotated"
    if upright.mode == "I" or upright.mode.startswith("I;16"):  # Pillow's own conversion of 16-bit grey clips at 255
        upright = Image.fromarray(_eight_bits(np.asarray(upright)))
    alpha = None
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        layered = upright.convert("RGBA")
        alpha = np.asarray(layered.getchannel("A"))
        flat = Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
        flat.info = dict(upright.info)
        upright = flat
    converted = _to_srgb(upright)
    if converted is not upright:
        mode += " profile"
    return Picture(np.asarray(converted.convert("RGB")), alpha, mode)


def _eight_bits(deep: np.ndarray) -> np.ndarray:
    """16-bit values to 8 bits: 65535 becomes 255."""
    return np.rint(deep.astype(np.float64).clip(0, 65535) / 257).astype(np.uint8)


def _to_srgb(image: Image.Image) -> Image.Image:
    """Apply an embedded colour profile (wide-gamut phones, print CMYK); without a usable one keep the values."""
    embedded = image.info.get("icc_profile")
    if not embedded or image.mode not in ("RGB", "CMYK"):
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(embedded))
        if "srgb" in ImageCms.getProfileDescription(profile).lower():
            return image
        target = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, profile, target, outputMode="RGB") or image
    except (ImageCms.PyCMSError, OSError):  # many files carry broken profiles; viewers show their plain values, too
        return image


def shrunk(picture: Picture, longest: int) -> Picture:
    """Reduce a picture by a whole factor so that its shorter side stays at least `longest`."""
    factor = shrink_factor(picture.size, longest)
    if factor == 1:
        return picture
    pixels = np.asarray(Image.fromarray(picture.pixels).reduce(factor))
    alpha = None if picture.alpha is None else np.asarray(Image.fromarray(picture.alpha).reduce(factor))
    return Picture(pixels, alpha, picture.mode)


def shrink_factor(size: tuple[int, int], longest: int) -> int:
    """The whole factor by which `shrunk` reduces a picture of this height and width."""
    return max(1, min(size) // longest)


def size_of(data: bytes, name: str) -> tuple[int, int]:
    """Height and width of an upright picture, from its header alone; the first bytes of the file may be enough.

    Raises:
        DataError: The bytes are no picture, or it is too large or too narrow to be one.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_sides(image)
            width, height = image.size
            # Asked for what its header lacks, Pillow reads a whole PNG.
            said = image.format != "PNG" or "exif" in image.info
            turned = said and image.getexif().get(0x0112, 1) >= 5
    except Image.UnidentifiedImageError as error:
        raise DataError(f"{name} is no jpg, png or webp picture; replace or remove the file") from error
    except DAMAGE as error:
        raise DataError(f"cannot read picture {name}: {error}; replace or remove the file") from error
    return (width, height) if turned else (height, width)
