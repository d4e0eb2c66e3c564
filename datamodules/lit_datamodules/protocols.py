"""What a data module needs from a base; bound before `setup`, so that this package imports none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor


class TextEncoder(Protocol):
    """Turns captions into ids."""

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, ...]:
        """One int64 `[B, S]` per tokenizer."""


class ImageEncoder(Protocol):
    """Turns pictures into VAE posteriors."""

    @property
    def downscale(self) -> int:
        """Pixels per latent cell."""

    @property
    def needs_time_ids(self) -> bool:
        """Whether batches carry SDXL's size conditioning."""

    def encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `[B, C, h, w]` of pixels `[B, 3, H, W]` in [-1, 1]."""


class Generator(Protocol):
    """Draws pictures from captions."""

    def __call__(self, captions: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        """uint8 `[N, H, W, 3]`."""
