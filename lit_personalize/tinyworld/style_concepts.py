"""Held-out styles for personalization to learn: ordinary scenes drawn in a style that the base has never seen.

All are before places: in some styles, on a plain background, colour and ground cannot be told apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lit_personalize.tinyworld import vocabulary as v
from lit_personalize.tinyworld.attributes import targets
from lit_personalize.tinyworld.captions import caption
from lit_personalize.tinyworld.concepts import Subject
from lit_personalize.tinyworld.dataset import Pictures, write_photos_with
from lit_personalize.tinyworld.reader import Reader
from lit_personalize.tinyworld.render import render
from lit_personalize.tinyworld.scene import Scene, sample_body, sample_split, sample_thing, split_of

STYLES_FOR_SCIENCE: tuple[str, ...] = v.HELD_OUT_STYLES
NEIGHBOR = "cartoon"
"""A style that the base knows, at which the word of a new one begins."""
PLACES: tuple[str, ...] = tuple(name for name in v.PLACES if name != "night")
"""Night is black in some styles."""
ASKED = 12


def _scenes(count: int, generator: list[int]) -> list[Scene]:
    """Base scenes without style before places in turn: two objects, then a critter."""
    rng = np.random.default_rng(generator)
    places = [str(place) for place in rng.permutation(PLACES)]
    found: list[Scene] = []
    while len(found) < count:
        place, seed = places[len(found) % len(places)], int(rng.integers(2**31))
        if len(found) % 3 == 2:
            color = str(rng.choice([c for c in v.COLORS if c not in ("black", "white")]))
            scene = Scene("critter", background=place, color=color, attributes=(str(rng.choice(["hat", "horns"])),),
                          body=sample_body(rng), seed=seed)  # fmt: skip
        else:
            thing = sample_thing(rng, texture="flat", size="large", avoid=place)
            scene = Scene("object", things=(thing,), background=place, seed=seed)
        if split_of(scene) == "train":
            found.append(scene)
    return found


def style_pictures(style: str, count: int, seed: int = 0) -> Pictures:
    """Pictures to learn a style from; other contents for another seed."""
    scenes = [replace(scene, style=style) for scene in _scenes(count, [seed, 41])]
    return Pictures(np.stack([render(scene) for scene in scenes]), scenes)


def write_style_photos(style: str, folder: Path, count: int, seed: int, word: str) -> Pictures:
    """Write pictures of a style, `NAME.png`, with captions that call it `word`, `NAME.txt`."""
    pictures = style_pictures(style, count, seed)
    captions = [f"{caption(replace(scene, style='photo'))} in {word} style" for scene in pictures.scenes]
    write_photos_with(captions, pictures, folder)
    return pictures


def known_styles(count: int, seed: int = 0) -> Pictures:
    """Render pictures in the styles that the base knows, in turn: a regularization set for styles."""
    rng = np.random.default_rng([seed, 42])
    scenes = [sample_split(rng, "train", kind="object") for _ in range(count)]
    scenes = [replace(scene, style=v.STYLES[i % len(v.STYLES)]) for i, scene in enumerate(scenes)]
    return Pictures(np.stack([render(scene) for scene in scenes]), scenes)


def asked_scenes(style: str) -> list[Scene]:
    """What is asked for in a learned style: contents that no training picture of it has."""
    return [replace(scene, style=style) for scene in _scenes(ASKED, [43])]


def style_shares(pixels: np.ndarray, scenes: Sequence[Scene], reader: Reader) -> dict[str, float]:
    """What the reader finds in pictures `[N, 64, 64, 3]`, each in [0, 1].

    "style" is the share with their scene's style, "content" that of what the style leaves readable of the
    scene, "style and content" that of pictures with all of it.
    """
    styled, content, whole = [], [], []
    for scene, reading in zip(scenes, reader.read(pixels), strict=True):
        wanted = targets(scene)
        wanted.pop("style", None)
        right = [reading[head] == value for head, value in wanted.items()]
        styled.append(reading["style"] == scene.style)
        content.append(np.mean(right))
        whole.append(styled[-1] and all(right))
    return {"style": float(np.mean(styled)), "content": float(np.mean(content)),
            "style and content": float(np.mean(whole))}  # fmt: skip


def styled_scene(subject: Subject, style: str, place: str, seed: int) -> Scene:
    """A subject in a style, as the renderer draws it."""
    return replace(subject.scene(place, np.random.default_rng([seed, 44])), style=style)


def styled_subject_shares(
    pixels: np.ndarray, scenes: Sequence[Scene], subject: Subject, reader: Reader
) -> dict[str, float]:
    """What the reader finds in pictures of a subject in a style, each in [0, 1].

    "subject" is the share of its attributes that the style leaves readable, "style" that of pictures in the
    style, "both" the mean over pictures of the first where the second holds, and 0 elsewhere.
    """
    shown, styled = [], []
    for scene, reading in zip(scenes, reader.read(pixels), strict=True):
        wanted = {head: value for head, value in targets(scene).items() if head in subject.attributes}
        shown.append(np.mean([reading["kind"] == scene.kind and reading[head] == x for head, x in wanted.items()]))
        styled.append(reading["style"] == scene.style)
    both = np.mean([share if right else 0.0 for share, right in zip(shown, styled, strict=True)])
    return {"subject": float(np.mean(shown)), "style": float(np.mean(styled)), "both": float(both)}
