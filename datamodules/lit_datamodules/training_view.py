"""What the model sees of a sample at one place of one step: pixels, mask, caption, SDXL's sizes.

Everything is drawn from (seed, purpose, step, position), each purpose on its own, so that turning one
option on does not change the draws of another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lit_datamodules.buckets import Buckets, Shape, shapes_of
from lit_datamodules.concept_folder import Sample
from lit_datamodules.order import INSTANCE, Slot, counter_rng
from lit_datamodules.resize_augmentation import (
    CropMode,
    View,
    apply_view,
    apply_view_to_alpha,
    crop_box,
    custom_diffusion_view,
    latent_mask,
    plain_view,
    prefixed,
)

Augmentation = Literal["none", "custom_diffusion", "custom_diffusion_port"]


@dataclass(frozen=True)
class Geometry:
    """Options of a data module that decide views.

    Args:
        size: Side of a square view in pixels; the largest of several resolutions.
        downscale: Pixels per latent cell.
        augmentation: Of instances; regularization pictures are never augmented.
        crop: Of pictures that are not square.
        seed: Of all draws.
        resolutions: Smaller sides in which pictures are shown, too.
        buckets: Shapes near the pictures' own instead of squares.
    """

    size: int
    downscale: int
    augmentation: Augmentation = "none"
    crop: CropMode = "center"
    seed: int = 0
    resolutions: tuple[int, ...] = ()
    buckets: Buckets | None = None

    def shapes(self, sample: Sample) -> tuple[Shape, ...]:
        """Heights and widths of the views in which a sample is shown as an instance, smallest first."""
        return shapes_of(sample.original, (*self.resolutions, self.size), self.buckets)

    def moves(self, role: int) -> str:
        """Why the pictures of a role look different at every step (but for mirroring); "" if they do not."""
        if self.augmentation != "none" and role == INSTANCE:
            return "augmentation resizes the pictures at every step"
        return "random crops move the pictures at every step" if self.crop == "random" else ""


@dataclass(frozen=True)
class Shot:
    """A view that is decided but not drawn yet: what is cut out, how it is placed, what is said about it."""

    view: View
    box: tuple[int, int, int, int]
    """Left, top, right, bottom in the sample's pixels."""
    caption: str
    time_ids: tuple[float, float, float, float, float, float]
    """SDXL's `[original height, width, crop top, left, target height, width]` in pixels."""


def decide(sample: Sample, slot: Slot, geometry: Geometry) -> Shot:
    """Draw crop, placement, mirroring and caption for one place of a step."""

    def rng(purpose: str) -> np.random.Generator:
        return counter_rng(geometry.seed, purpose, slot.step, slot.position)

    view = plain_view(slot.shape)
    if geometry.augmentation != "none" and sample.role == INSTANCE:
        variant: Literal["paper", "port"] = "port" if geometry.augmentation == "custom_diffusion_port" else "paper"
        view = custom_diffusion_view(rng("resize"), slot.shape, variant)
    flip = bool(sample.flip) and rng("flip").random() < sample.flip
    caption = sample.captions[int(rng("caption").integers(len(sample.captions)))]
    return _shot(sample, view, flip, caption, geometry, rng("crop"))


def still(sample: Sample, geometry: Geometry, flip: bool = False, shape: Shape | None = None) -> Shot:
    """The view without chance: centred (or squashed), not augmented, with the first caption; by default its largest."""
    crop: CropMode = "center" if geometry.crop == "random" else geometry.crop
    steady = replace(geometry, augmentation="none", crop=crop)
    return _shot(sample, plain_view(shape or geometry.shapes(sample)[-1]), flip, sample.captions[0], steady, None)


def _shot(
    sample: Sample, view: View, flip: bool, caption: str, geometry: Geometry, rng: np.random.Generator | None
) -> Shot:
    box = crop_box(sample.size, view.shape, geometry.crop, rng)
    top = round(box[1] * view.scaled[0] / (box[3] - box[1]) + (view.top if view.zoomed else 0))
    left = round(box[0] * view.scaled[1] / (box[2] - box[0]) + (view.left if view.zoomed else 0))
    first, second, third, fourth, fifth, sixth = map(float, (*sample.original, top, left, *view.shape))
    caption = prefixed(view.prefix, caption)
    return Shot(replace(view, flip=flip), box, caption, (first, second, third, fourth, fifth, sixth))


def pixels_of(sample: Sample, shot: Shot) -> np.ndarray:
    """fp32 `[3, H, W]` in [-1, 1]."""
    return apply_view(sample.pixels, shot.view, shot.box)


def mask_of(sample: Sample, shot: Shot, downscale: int) -> np.ndarray:
    """fp32 `[1, h, w]`: how much every latent cell counts in the loss.

    A view in which nothing opaque is left counts as if it had no alpha: its caption still describes it.
    """
    mask = latent_mask(shot.view, downscale)
    if sample.alpha is not None:
        opaque = mask * apply_view_to_alpha(sample.alpha, shot.view, downscale, shot.box)
        if opaque.sum() >= 1:
            return opaque
    return mask
