"""Geometry of a training view, as pure functions of a generator.

`custom_diffusion_view` is the resize augmentation of Custom Diffusion (Kumari et al., 2022, arXiv
2212.04488, sec. 3.2): small views are pasted on grey with a mask and a prompt prefix, large ones are
random crops of an enlarged picture. The ranges are those that the authors trained with: scales from
1/3 to 1 and from 1.2 to 1.4, of which those from 0.6 to 1 show the picture at full size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from lit_datamodules.buckets import Shape

SMALL_PREFIXES = ("a far away ", "very small ")
LARGE_PREFIXES = ("zoomed in ", "close up ")
ARTICLES = ("a ", "an ", "the ")
Variant = Literal["paper", "port"]
CropMode = Literal["center", "random", "squash"]


def prefixed(prefix: str, caption: str) -> str:
    """A caption with a view's prefix, which stands for an article that the caption begins with."""
    article = next((a for a in ARTICLES if caption.lower().startswith(a)), "") if prefix else ""
    return prefix + caption[len(article) :]


@dataclass(frozen=True)
class View:
    """How a crop becomes a training view of `shape`, height and width in pixels.

    `scaled` is the height and width to which the crop is resized; `top`, `left` place it on the canvas where it is
    smaller than the view, and cut the view out of it where it is larger. `pasted` views have a mask.
    """

    shape: Shape
    scaled: Shape
    top: int = 0
    left: int = 0
    prefix: str = ""
    flip: bool = False
    pasted: bool = False

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the picture on the canvas."""
        if self.zoomed or self.scaled == self.shape:
            return (0, 0, self.shape[1], self.shape[0])
        return (self.left, self.top, self.left + self.scaled[1], self.top + self.scaled[0])

    @property
    def zoomed(self) -> bool:
        """Whether the view is cut out of an enlarged picture."""
        return self.scaled[0] > self.shape[0]


def plain_view(shape: Shape, flip: bool = False) -> View:
    """The picture at full size, without augmentation."""
    return View(shape, shape, flip=flip)


def custom_diffusion_view(rng: np.random.Generator, shape: Shape, variant: Variant = "paper") -> View:
    """Draw a view of this height and width in pixels; the ranges are of its shorter side.

    With probability 2/3 the scale is in [1/3, 1], else in [1.2, 1.4). Below 0.6 the picture is pasted
    small and the prompt says so. From 0.6 to 1 it is shown at full size; `variant="port"` pastes it at
    its scale, masked but without a prefix, as the port in diffusers does.
    """
    size = min(shape)
    if rng.random() < 2 / 3:
        side = _even(int(rng.integers(size // 3, size + 1)), limit=size)
    else:
        side = _even(int(rng.integers(int(1.2 * size), int(1.4 * size))))
    height, width = (_even(round(whole * side / size)) for whole in shape)
    if side > size:
        top, left = int(rng.integers(0, height - shape[0] + 1)), int(rng.integers(0, width - shape[1] + 1))
        return View(shape, (height, width), top, left, LARGE_PREFIXES[int(rng.integers(2))])
    height, width = min(height, shape[0]), min(width, shape[1])
    small = side < 0.6 * size
    if not small and variant == "paper":
        return View(shape, shape)
    top, left = int(rng.integers(0, shape[0] - height + 1)), int(rng.integers(0, shape[1] - width + 1))
    prefix = SMALL_PREFIXES[int(rng.integers(2))] if small else ""
    return View(shape, (height, width), top, left, prefix, pasted=True)


def _even(side: int, limit: int | None = None) -> int:
    side += side % 2
    return side if limit is None else min(side, limit)


def latent_mask(view: View, downscale: int) -> np.ndarray:
    """fp32 `[1, h, w]`: latent cells strictly inside a pasted picture, else ones.

    One cell of border is dropped, because its latent has seen the grey beside the picture. Where
    nothing would be left (a small picture in a coarse latent) the cell at its centre counts.
    """
    mask = np.ones((1, view.shape[0] // downscale, view.shape[1] // downscale), dtype=np.float32)
    if view.pasted:
        mask[:] = 0
        height, width = view.scaled
        rows = slice(view.top // downscale + 1, (view.top + height) // downscale - 1)
        columns = slice(view.left // downscale + 1, (view.left + width) // downscale - 1)
        mask[:, rows, columns] = 1
        if not mask.any():
            mask[:, (view.top + height // 2) // downscale, (view.left + width // 2) // downscale] = 1
    return mask


def crop_box(
    size: Shape, shape: Shape, mode: CropMode, rng: np.random.Generator | None = None
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is shown of a picture of height and width `size` in a view of `shape`.

    "center" and "random" take the largest part with the view's aspect ratio ("random" needs `rng`); "squash" takes
    everything and loses the picture's.
    """
    (height, width), (high, wide) = size, shape
    if mode == "squash":
        return (0, 0, width, height)
    if height * wide <= width * high:
        rows, columns = height, max(1, round(height * wide / high))
    else:
        rows, columns = max(1, round(width * high / wide)), width
    if mode == "center":
        top, left = (height - rows) // 2, (width - columns) // 2
    elif rng is None:
        raise ValueError("a random crop needs a generator")
    else:
        top, left = int(rng.integers(0, height - rows + 1)), int(rng.integers(0, width - columns + 1))
    return (left, top, left + columns, top + rows)


def apply_view(picture: np.ndarray, view: View, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """Crop `box` of a picture uint8 `[H, W, 3]` as a view fp32 `[3, *shape]` in [-1, 1]; the canvas is grey (0)."""
    pixels = _resized(picture, view, box) / np.float32(127.5) - 1
    return np.ascontiguousarray(_placed(pixels, view, background=0.0).transpose(2, 0, 1))


def apply_view_to_alpha(
    alpha: np.ndarray, view: View, downscale: int, box: tuple[int, int, int, int] | None = None
) -> np.ndarray:
    """Opaque share of every latent cell, fp32 `[1, h, w]` in [0, 1], from alpha uint8 `[H, W]`."""
    opaque = _placed(_resized(alpha, view, box)[..., None] / np.float32(255), view, background=0.0)[..., 0]
    rows, columns = (side // downscale for side in view.shape)
    return opaque.reshape(rows, downscale, columns, downscale).mean(axis=(1, 3), dtype=np.float32)[None]


def _resized(picture: np.ndarray, view: View, box: tuple[int, int, int, int] | None) -> np.ndarray:
    image = Image.fromarray(picture)
    resized = image.resize(view.scaled[::-1], Image.Resampling.BICUBIC, box=box)  # Pillow filters before it shrinks
    values = np.asarray(resized, dtype=np.float32)
    return values[:, ::-1] if view.flip else values


def _placed(values: np.ndarray, view: View, background: float) -> np.ndarray:
    if view.scaled == view.shape:
        return values
    if view.zoomed:
        return values[view.top : view.top + view.shape[0], view.left : view.left + view.shape[1]]
    canvas = np.full((*view.shape, values.shape[-1]), background, dtype=np.float32)
    canvas[view.top : view.top + view.scaled[0], view.left : view.left + view.scaled[1]] = values
    return canvas
