"""What a data module needs from a base; bound before `setup`, so that this package imports none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

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
    def resolution(self) -> int:
        """Native side of the pictures in pixels."""

    @property
    def needs_time_ids(self) -> bool:
        """Whether batches carry SDXL's size conditioning."""

    @property
    def vae_identity(self) -> str:
        """Changes with the weights and the precision of what `encode_pixels` runs."""

    def encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `[B, C, h, w]` of pixels `[B, 3, H, W]` in [-1, 1]."""


class Generator(Protocol):
    """Draws pictures from captions; the same caption and seed give the same picture."""

    def __call__(self, captions: Sequence[str], seeds: Sequence[int]) -> Any:
        """uint8 `[N, H, W, 3]`, an array or a tensor."""
