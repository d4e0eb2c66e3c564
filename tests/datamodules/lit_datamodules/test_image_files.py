"""Every picture that people have comes out upright, 8 bits deep, in RGB; a damaged one is named."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from lit_datamodules.errors import DataError
from lit_datamodules.image_files import decode_image, list_images, natural_key, read_image, size_of

RED, BLUE = (200, 30, 40), (20, 60, 180)


@pytest.fixture
def picture() -> Image.Image:
    """12 wide, 8 high; red on the left, blue on the right."""
    image = Image.new("RGB", (12, 8), RED)
    image.paste(BLUE, (6, 0, 12, 8))
    return image


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def near(pixels: np.ndarray, color: tuple[int, ...], tolerance: int = 0) -> bool:
    return bool((np.abs(pixels.astype(int) - np.array(color)) <= tolerance).all())


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_formats(picture: Image.Image, kind: str) -> None:
    options = {"PNG": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}[kind]
    pixels = decode_image(encoded(picture, kind, **options), kind).pixels
    assert pixels.shape == (8, 12, 3) and pixels.dtype == np.uint8
    assert near(pixels[:, :5], RED, 4) and near(pixels[:, 7:], BLUE, 4)


@pytest.mark.parametrize(
    ("orientation", "shape", "red"),
    [
        (1, (8, 12), np.s_[:, :6]),
        (2, (8, 12), np.s_[:, 6:]),
        (3, (8, 12), np.s_[:, 6:]),
        (6, (12, 8), np.s_[:6, :]),  # a phone held upright
        (8, (12, 8), np.s_[6:, :]),
    ],
)
def test_exif_rotation(picture: Image.Image, orientation: int, shape: tuple[int, int], red: object) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode_image(encoded(picture, "PNG", exif=exif), "photo")
    assert found.size == shape
    assert near(found.pixels[red], RED)  # type: ignore[call-overload]
    assert ("rotated" in found.mode) == (orientation != 1)


@pytest.mark.parametrize("value", [0, 128, 257, 30000, 65535])
def test_sixteen_bits_keep_their_brightness(value: int) -> None:
    """Dark 16-bit pictures stay dark, and bright ones do not saturate at 255 of 65535."""
    deep = Image.fromarray(np.full((4, 5), value, dtype=np.uint16))
    pixels = decode_image(encoded(deep), "scan").pixels
    assert pixels.shape == (4, 5, 3)
    assert near(pixels, (round(value / 257),) * 3)


def test_gray_one_bit_and_palette(picture: Image.Image) -> None:
    gray = decode_image(encoded(picture.convert("L")), "gray").pixels
    assert near(gray[:, :6], (picture.convert("L").getpixel((0, 0)),) * 3)  # type: ignore[arg-type]
    assert near(decode_image(encoded(Image.new("1", (3, 3), 1)), "fax").pixels, (255, 255, 255))
    palette = picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    assert near(decode_image(encoded(palette), "palette").pixels[:, :6], RED, 2)


def test_cmyk_jpeg(picture: Image.Image) -> None:
    found = decode_image(encoded(picture.convert("CMYK"), "JPEG", quality=100, subsampling=0), "print")
    assert found.mode == "CMYK"
    assert near(found.pixels[:, :5], RED, 6) and near(found.pixels[:, 7:], BLUE, 6)


def test_alpha_lies_over_white_and_is_kept(picture: Image.Image) -> None:
    layered = picture.convert("RGBA")
    layered.putalpha(0)
    layered.paste((*RED, 128), (0, 0, 6, 8))
    found = decode_image(encoded(layered), "cutout")
    assert found.alpha is not None and found.alpha.shape == (8, 12)
    assert near(found.pixels[:, 6:], (255, 255, 255)), "what is transparent is white, whatever colour it hides"
    assert near(found.pixels[:, :6], tuple(round(c * 128 / 255 + 127) for c in RED), 1)
    assert (found.alpha[:, 6:] == 0).all() and (found.alpha[:, :6] == 128).all()


def test_transparent_palette_and_gray(picture: Image.Image) -> None:
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((1, 2), 1)
    found = decode_image(encoded(palette, transparency=0), "sticker")
    assert near(found.pixels[0, 0], (255, 255, 255)) and near(found.pixels[2, 1], BLUE)
    found = decode_image(encoded(Image.new("LA", (4, 4), (90, 0))), "gray cutout")
    assert near(found.pixels, (255, 255, 255)) and found.alpha is not None


def test_colour_profile_is_applied(picture: Image.Image) -> None:
    """The same numbers mean another colour under another profile; sRGB and broken ones change nothing."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert near(decode_image(encoded(picture, icc_profile=srgb), "web").pixels[:, :6], RED)
    assert near(decode_image(encoded(picture, icc_profile=b"not a profile"), "odd").pixels[:, :6], RED)
    # A profile whose red and blue primaries are exchanged, under another name.
    other = srgb.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    other = other.replace(b"rXYZ", b"?XYZ").replace(b"bXYZ", b"rXYZ").replace(b"?XYZ", b"bXYZ")
    found = decode_image(encoded(picture, icc_profile=other), "swapped")
    assert near(found.pixels[:, :6], RED[::-1], 3) and "profile" in found.mode


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_cut_off_picture_is_named(tmp_path: Path, kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    path = tmp_path / f"photo.{kind.lower()}"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=path.name) as caught:
        read_image(path)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_what_is_no_picture_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "page.png").write_bytes(data)
    with pytest.raises(DataError, match=r"page\.png"):
        read_image(tmp_path / "page.png")


def test_listing_is_natural_and_only_pictures(tmp_path: Path) -> None:
    for name in ("10.jpg", "2.JPG", "1.png", "a.webp", "b.jpeg", ".hidden.jpg", "notes.txt", "x.gif"):
        (tmp_path / name).touch()
    assert [p.name for p in list_images(tmp_path)] == ["1.png", "2.JPG", "10.jpg", "a.webp", "b.jpeg"]
    assert natural_key("a²3") != natural_key("a23"), "digits that are no decimals are text"


def test_missing_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone does not exist"):
        list_images(tmp_path / "gone")
    with pytest.raises(DataError, match="holds no jpg, png or webp"):
        list_images(tmp_path)
    (tmp_path / "file.jpg").touch()
    with pytest.raises(DataError, match="is a file"):
        list_images(tmp_path / "file.jpg")


@pytest.mark.parametrize(("size", "said"), [((1, 20_000), "1 x 20000 pixels is a strip"), ((30_000, 30_000), "bomb")])
def test_absurd_pictures_are_refused_unread(size: tuple[int, int], said: str) -> None:
    """By their headers: the large one has a file of a few bytes, and would have filled 2.5 GB."""
    chunk = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    header = b"IHDR" + chunk
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(chunk)) + header + struct.pack(">I", zlib.crc32(header))
    data += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    for read in (decode_image, size_of):
        with pytest.raises(DataError, match=f"cannot read picture absurd.*{said}"):
            read(data, "absurd")
