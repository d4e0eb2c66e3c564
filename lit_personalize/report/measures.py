"""What is measured of a trained subject, style or combination: pictures drawn for unseen prompts, read and compared."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from lit_personalize.adapters.protocol import Adapter
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.metrics import alignment
from lit_personalize.metrics.features import Clip
from lit_personalize.metrics.kernel_distance import mmd2
from lit_personalize.report.training import PHOTOS
from lit_personalize.sampling.sampler import SamplingOptions, generate
from lit_personalize.tinyworld.captions import caption
from lit_personalize.tinyworld.concepts import Subject, class_pictures, subject_pictures
from lit_personalize.tinyworld.reader import Reader
from lit_personalize.tinyworld.render import render
from lit_personalize.tinyworld.style_concepts import asked_scenes, style_pictures, style_shares
from lit_personalize.tinyworld.suite import asked_pictures, prompts_of, shares

OPTIONS = SamplingOptions(steps=15, guidance=2.0, scheduler="dpm", batch_size=16)
CLASS = 32
"""Pictures of the class prompt, for KID."""


@dataclass(frozen=True)
class Judges:
    """The reader and the metric CLIP of a folder of weights."""

    reader: Reader
    clip: Clip

    @classmethod
    @functools.lru_cache(maxsize=1)
    def of(cls, weights: Path) -> Judges:
        return cls(Reader.load(weights / "reader"), Clip(weights / "clip"))


@functools.lru_cache(maxsize=64)
def _untouched(prompts: tuple[str, ...], seeds: tuple[int, ...]) -> np.ndarray:
    """Pictures of the base alone, which many cells compare with."""
    return generate(load_base("tinyworld"), prompts, seeds, None, OPTIONS)


def seeds_of(seed: int, prompts: Sequence[str]) -> list[int]:
    return [1000 * seed + i for i in range(len(prompts))]


def similarities(clip: Clip, pixels: np.ndarray, texts: Tensor, training: Tensor) -> dict[str, float]:
    features = clip.images(pixels)
    return {
        "CLIP-T": alignment.text_alignment(features, texts),
        "CLIP-I": alignment.image_alignment(features, training),
        "nearest training picture": alignment.nearest_similarity(features, training),
    }


def measure_subject(
    subject: Subject, base: Base, adapters: Sequence[Adapter], weights: Path, seed: int, word: str
) -> tuple[dict[str, float], np.ndarray]:
    """What the pictures of unseen prompts show, and how far class pictures moved.

    Also the first prompt's picture with the adapter, the real one and the untouched base's, side by side:
    uint8 `[64, 3 * 64, 3]`.
    """
    judges = Judges.of(weights)
    asked = prompts_of(subject, word)
    prompts = [prompt for prompt, _ in asked] * 2
    grounds = [ground for _, ground in asked] * 2
    plain = [alignment.without_token(p, word) for p in prompts]
    drawn = generate(base, prompts, seeds_of(seed, prompts), adapters, OPTIONS)
    noun = f"a photo of a {subject.class_noun}"
    class_with = judges.clip.images(generate(base, [noun] * CLASS, list(range(CLASS)), adapters, OPTIONS))
    class_real = judges.clip.images(class_pictures(subject, 200, seed=900).pixels)
    class_base = judges.clip.images(_untouched((noun,) * CLASS, tuple(range(100, 100 + CLASS))))
    floor = _untouched(tuple(plain), tuple(seeds_of(seed, plain)))
    training = judges.clip.images(subject_pictures(subject, PHOTOS, seed).pixels)
    texts = judges.clip.texts(plain)
    real = asked_pictures(subject, grounds)
    figures = {
        "CLIP-T normalised": alignment.normalised_text_alignment(judges.clip.images(drawn), texts),
        "KID x 1000, class prompt": 1000 * mmd2(class_with, class_base, "kid"),
        "KID x 1000, class prompt to real": 1000 * mmd2(class_with, class_real, "kid"),
    }
    for suffix, pixels in (("", drawn), (", real", real), (", base", floor)):
        values = shares(pixels, subject, grounds, judges.reader)
        values |= similarities(judges.clip, pixels, texts, training)
        figures.update({f"{name}{suffix}": value for name, value in values.items()})
    return figures, side_by_side(drawn, real, floor)


def measure_style(
    style: str, base: Base, adapters: Sequence[Adapter], weights: Path, seed: int, word: str
) -> tuple[dict[str, float], np.ndarray]:
    """As `measure_subject`, of a style on unseen contents. Plain pictures are those of the same prompts without it."""
    judges = Judges.of(weights)
    scenes = asked_scenes(style) * 2
    plain = [caption(replace(scene, style="photo")) for scene in scenes]
    prompts = [f"{said} in {word} style" for said in plain]
    drawn = generate(base, prompts, seeds_of(seed, prompts), adapters, OPTIONS)
    floor = _untouched(tuple(plain), tuple(seeds_of(seed, plain)))
    # Other noise than the base's: two samples are compared, not pairs.
    with_adapter = generate(base, plain, seeds_of(seed + 100, plain), adapters, OPTIONS)
    training = judges.clip.images(style_pictures(style, PHOTOS, seed).pixels)
    texts = judges.clip.texts(plain)
    real = np.stack([render(scene) for scene in scenes])
    figures = {
        "CLIP-T normalised": alignment.normalised_text_alignment(judges.clip.images(drawn), texts),
        "KID x 1000, plain prompts": 1000 * mmd2(judges.clip.images(with_adapter), judges.clip.images(floor), "kid"),
        "style, plain prompts": style_shares(with_adapter, scenes, judges.reader)["style"],
    }
    for suffix, pixels in (("", drawn), (", real", real), (", base", floor)):
        values = style_shares(pixels, scenes, judges.reader) | similarities(judges.clip, pixels, texts, training)
        figures.update({f"{name}{suffix}": value for name, value in values.items()})
    return figures, side_by_side(drawn, real, floor)


def side_by_side(*pictures: np.ndarray) -> np.ndarray:
    """The first picture of each, uint8 `[64, n * 64, 3]`."""
    return np.concatenate([batch[0] for batch in pictures], axis=1)
