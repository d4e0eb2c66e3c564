"""Shapes of training views: squares, or aspect-ratio buckets of about the same area (NovelAI, 2022), at one or more
resolutions.

A shape is `(height, width)` in pixels. A picture has one at every resolution that it is large enough for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from lit_datamodules.errors import DataOptionError

Shape = tuple[int, int]


@dataclass(frozen=True)
class Buckets:
    """Views in shapes near the pictures' own, of at most `resolution` squared pixels.

    Args:
        step: Sides are multiples of it; 64 suits every Stable Diffusion.
        min_side: Shortest side in pixels; None takes half the resolution.
        max_side: Longest side in pixels; None takes twice the resolution.
        enlarge: Show small pictures at full area; otherwise none is enlarged, unless it is below `min_side`.
    """

    step: int = 64
    min_side: int | None = None
    max_side: int | None = None
    enlarge: bool = False

    def limits(self, resolution: int) -> tuple[int, int]:
        """Shortest and longest side at a resolution, multiples of `step`."""
        low = self.min_side if self.min_side is not None else resolution // 2
        high = self.max_side if self.max_side is not None else 2 * resolution
        return -(-low // self.step) * self.step, high // self.step * self.step

    def check(self, resolution: int, downscale: int) -> None:
        """Refuse options that leave no choice of shapes.

        Raises:
            DataOptionError: It names the option.
        """
        if self.step < 1 or self.step % downscale:
            raise DataOptionError(
                f"data.buckets.step {self.step} is no multiple of {downscale}, the pixels per latent cell of this base"
            )
        low, high = self.limits(resolution)
        if not 0 < low <= resolution <= high:
            raise DataOptionError(
                f"data.buckets: sides from {low} to {high} pixels do not enclose data.resolution {resolution}; "
                "change min_side or max_side"
            )
        if len(_shapes(resolution**2, self.step, low, high, high, high)) < 3:
            raise DataOptionError(
                f"data.buckets.step {self.step} leaves one shape at data.resolution {resolution}; choose a smaller step"
            )

    def shape(self, size: Shape, resolution: int) -> Shape:
        """The shape nearest in aspect ratio to a picture of this height and width; of equally near ones the largest."""
        height, width = size
        low, high = self.limits(resolution)
        shapes = _shapes(resolution**2, self.step, low, high, high, high)
        if not self.enlarge:
            own = min(resolution**2, height * width)
            smaller = _shapes(own, self.step, low, high, min(height, high), min(width, high))
            shapes = smaller or _shapes(low**2, self.step, low, high, high, high)
        return min(shapes, key=lambda s: (round(abs(math.log(s[0] * width / (s[1] * height))), 9), -s[0] * s[1], s))


@lru_cache(maxsize=4096)
def _shapes(area: int, step: int, low: int, high: int, height: int, width: int) -> tuple[Shape, ...]:
    """All shapes with sides from `low` to `high`, within `height` x `width`, that fill `area` as far as they can."""

    def filled() -> Iterator[Shape]:
        for side in range(low, high + 1, step):
            other = min(area // side // step * step, high)
            tall, wide = (side, min(other, width // step * step)), (min(other, height // step * step), side)
            yield from (s for s in (tall, wide) if low <= s[0] <= height and low <= s[1] <= width)

    return tuple(sorted(set(filled())))


def shapes_of(size: Shape, resolutions: Sequence[int], buckets: Buckets | None) -> tuple[Shape, ...]:
    """The shapes in which a picture of this height and width is shown, smallest resolution first.

    The smallest resolution shows every picture; larger ones only those that need not be enlarged for them.
    """
    ascending = sorted(set(resolutions))
    enough = math.isqrt(size[0] * size[1]) if buckets else min(size)
    enlarges = buckets is not None and buckets.enlarge
    fit = [r for r in ascending if r == ascending[0] or enlarges or enough >= r]
    return tuple(dict.fromkeys(buckets.shape(size, r) if buckets else (r, r) for r in fit))
