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

SMALL_PREFIXES = ("a far away ", "very small ")
LARGE_PREFIXES = ("zoomed in ", "close up ")
Variant = Literal["paper", "port"]
CropMode = Literal["center", "random", "squash"]


@dataclass(frozen=True)
class View:
    """How a crop becomes a training view of `size` pixels a side.

    `scaled` is the side to which the crop is resized; `top`, `left` place it on the canvas where it is
    smaller than the view, and cut the view out of it where it is larger. `pasted` views have a mask.
    """

    size: int
    scaled: int
    top: int = 0
    left: int = 0
    prefix: str = ""
    flip: bool = False
    pasted: bool = False

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the picture on the canvas."""
        if self.scaled >= self.size:
            return (0, 0, self.size, self.size)
        return (self.left, self.top, self.left + self.scaled, self.top + self.scaled)


def plain_view(size: int, flip: bool = False) -> View:
    """The picture at full size, without augmentation."""
    return View(size, size, flip=flip)


def custom_diffusion_view(rng: np.random.Generator, size: int, variant: Variant = "paper") -> View:
    """Draw a view for a picture of `size` pixels a side.

    With probability 2/3 the scale is in [1/3, 1], else in [1.2, 1.4). Below 0.6 the picture is pasted
    small and the prompt says so. From 0.6 to 1 it is shown at full size; `variant="port"` pastes it at
    its scale, masked but without a prefix, as the port in diffusers does.
    """
    if rng.random() < 2 / 3:
        scaled = _even(int(rng.integers(size // 3, size + 1)), limit=size)
    else:
        scaled = _even(int(rng.integers(int(1.2 * size), int(1.4 * size))))
    if scaled > size:
        top, left = (int(x) for x in rng.integers(0, scaled - size + 1, 2))
        return View(size, scaled, top, left, LARGE_PREFIXES[int(rng.integers(2))])
    small = scaled < 0.6 * size
    if not small and variant == "paper":
        return View(size, size)
    top, left = (int(x) for x in rng.integers(0, size - scaled + 1, 2))
    return View(size, scaled, top, left, SMALL_PREFIXES[int(rng.integers(2))] if small else "", pasted=True)


def _even(side: int, limit: int | None = None) -> int:
    side += side % 2
    return side if limit is None else min(side, limit)


def latent_mask(view: View, downscale: int) -> np.ndarray:
    """fp32 `[1, h, w]`: latent cells strictly inside a pasted picture, else ones.

    One cell of border is dropped, because its latent has seen the grey beside the picture. Where
    nothing would be left (a small picture in a coarse latent) the cell at its centre counts.
    """
    cells = view.size // downscale
    mask = np.ones((1, cells, cells), dtype=np.float32)
    if view.pasted:
        mask[:] = 0
        rows = slice(view.top // downscale + 1, (view.top + view.scaled) // downscale - 1)
        columns = slice(view.left // downscale + 1, (view.left + view.scaled) // downscale - 1)
        mask[:, rows, columns] = 1
        if not mask.any():
            half = view.scaled // 2
            mask[:, (view.top + half) // downscale, (view.left + half) // downscale] = 1
    return mask


def crop_box(
    height: int, width: int, mode: CropMode, rng: np.random.Generator | None = None
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is shown of a picture.

    "center" and "random" take the largest square ("random" needs `rng`); "squash" takes everything and
    loses the aspect ratio.
    """
    if mode == "squash":
        return (0, 0, width, height)
    side = min(height, width)
    if mode == "center":
        top, left = (height - side) // 2, (width - side) // 2
    elif rng is None:
        raise ValueError("a random crop needs a generator")
    else:
        top, left = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))
    return (left, top, left + side, top + side)


def apply_view(picture: np.ndarray, view: View, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """Crop `box` of a picture uint8 `[H, W, 3]` as a view fp32 `[3, size, size]` in [-1, 1]; the canvas is grey (0)."""
    pixels = _resized(picture, view, box) / np.float32(127.5) - 1
    return np.ascontiguousarray(_placed(pixels, view, background=0.0).transpose(2, 0, 1))


def apply_view_to_alpha(
    alpha: np.ndarray, view: View, downscale: int, box: tuple[int, int, int, int] | None = None
) -> np.ndarray:
    """Opaque share of every latent cell, fp32 `[1, h, w]` in [0, 1], from alpha uint8 `[H, W]`."""
    opaque = _placed(_resized(alpha, view, box)[..., None] / np.float32(255), view, background=0.0)[..., 0]
    cells = view.size // downscale
    return opaque.reshape(cells, downscale, cells, downscale).mean(axis=(1, 3), dtype=np.float32)[None]


def _resized(picture: np.ndarray, view: View, box: tuple[int, int, int, int] | None) -> np.ndarray:
    image = Image.fromarray(picture)
    side = (view.scaled, view.scaled)
    resized = image.resize(side, Image.Resampling.BICUBIC, box=box)  # Pillow filters before it shrinks
    values = np.asarray(resized, dtype=np.float32)
    return values[:, ::-1] if view.flip else values


def _placed(values: np.ndarray, view: View, background: float) -> np.ndarray:
    if view.scaled < view.size:
        canvas = np.full((view.size, view.size, values.shape[-1]), background, dtype=np.float32)
        canvas[view.top : view.top + view.scaled, view.left : view.left + view.scaled] = values
        return canvas
    if view.scaled > view.size:
        return values[view.top : view.top + view.size, view.left : view.left + view.size]
    return values
