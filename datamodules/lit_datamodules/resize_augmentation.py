"""Geometry of a training view, as pure functions of a generator.

`custom_diffusion_view` is the resize augmentation of Custom Diffusion (Kumari et al., 2022, sec. 3.2;
the code's ranges, which never produce 1.0-1.2): small views are pasted on grey with a mask and a
prompt prefix, large ones are random crops of an enlarged picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

SMALL_PREFIXES = ("a far away ", "very small ")
LARGE_PREFIXES = ("zoomed in ", "close up ")
Variant = Literal["paper", "port"]


@dataclass(frozen=True)
class View:
    """How a picture becomes a training view of side `size` pixels.

    `scaled` is the side to which the picture is resized; `top`, `left` place it on the canvas when it
    is smaller than the view, and crop from it when it is larger.
    """

    size: int
    scaled: int
    top: int = 0
    left: int = 0
    prefix: str = ""
    flip: bool = False

    @property
    def pasted(self) -> bool:
        return self.scaled < self.size


def custom_diffusion_view(rng: np.random.Generator, size: int, variant: Variant = "paper") -> View:
    """Draw a view: 2/3 of the time a scale in [1/3, 1], else in [1.2, 1.4).

    Below 0.6 the picture is pasted small. From 0.6 to 1 the paper's code shows it full size; the
    diffusers port pastes it at its scale (`variant="port"`), without a prefix.
    """
    if rng.random() < 2 / 3:
        scaled = int(rng.integers(size // 3, size + 1))
    else:
        scaled = int(rng.integers(int(1.2 * size), int(1.4 * size)))
    scaled -= scaled % 2
    if scaled > size:
        top, left = (int(x) for x in rng.integers(0, scaled - size + 1, 2))
        return View(size, scaled, top, left, LARGE_PREFIXES[int(rng.integers(2))])
    small = scaled < 0.6 * size
    if not small and variant == "paper":
        return View(size, size)
    top, left = (int(x) for x in rng.integers(0, size - scaled + 1, 2))
    return View(size, scaled, top, left, SMALL_PREFIXES[int(rng.integers(2))] if small else "")


def latent_mask(view: View, downscale: int) -> np.ndarray:
    """fp32 `[1, h, w]`: latent cells strictly inside a pasted picture (one cell of border dropped), else ones."""
    cells = view.size // downscale
    mask = np.ones((1, cells, cells), dtype=np.float32)
    if view.pasted:
        mask[:] = 0
        rows = slice(view.top // downscale + 1, (view.top + view.scaled) // downscale - 1)
        columns = slice(view.left // downscale + 1, (view.left + view.scaled) // downscale - 1)
        mask[:, rows, columns] = 1
    return mask


def square_crop(height: int, width: int, rng: np.random.Generator | None) -> tuple[int, int, int]:
    """Top, left and side of the largest square: centred, or placed by `rng`."""
    side = min(height, width)
    spare = np.array([height - side, width - side])
    top, left = (spare // 2) if rng is None else rng.integers(0, spare + 1)
    return int(top), int(left), side


def apply_view(picture: np.ndarray, view: View) -> np.ndarray:
    """Square uint8 `[S, S, 3]` to a float view `[3, size, size]` in [-1, 1]; the canvas is grey (0)."""
    image = Image.fromarray(picture)
    if image.size != (view.scaled, view.scaled):
        image = image.resize((view.scaled, view.scaled), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1
    if view.flip:
        pixels = pixels[:, ::-1]
    if view.pasted:
        canvas = np.zeros((view.size, view.size, 3), dtype=np.float32)
        canvas[view.top : view.top + view.scaled, view.left : view.left + view.scaled] = pixels
        pixels = canvas
    elif view.scaled > view.size:
        pixels = pixels[view.top : view.top + view.size, view.left : view.left + view.size]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
