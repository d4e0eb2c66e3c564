"""Subjects that the base has never seen, for personalization to learn: a table of fixed identities.

A subject is a class that the base knows (a base shape, or a critter) with attributes held out of its
training: a held-out colour and texture on a base shape, or a body and a set of parts of its own.
`subject_pictures` shows it on varied backgrounds, at varied places and sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lit_personalize.tinyworld import vocabulary as v
from lit_personalize.tinyworld.captions import background_phrase
from lit_personalize.tinyworld.dataset import Pictures, write_photos_with
from lit_personalize.tinyworld.render import render
from lit_personalize.tinyworld.scene import Scene, Thing, contrasting, sample_split

# Shapes with room for a texture.
ROOMY_SHAPES = ("circle", "square", "triangle", "heart", "hexagon", "diamond", "oval")


@dataclass(frozen=True)
class Subject:
    """One identity; `attributes` are what the reader can read of it, by head."""

    name: str
    class_noun: str
    attributes: dict[str, str] = field(hash=False)
    second_color: str = "white"
    critter_parts: tuple[str, ...] = ()
    body: tuple[float, ...] = ()
    radius: tuple[float, float] = (0.25, 0.36)
    """Smallest and largest one of a shape, in units of the picture's side."""

    @property
    def is_critter(self) -> bool:
        return self.class_noun == "critter"

    def scene(self, background: str, rng: np.random.Generator) -> Scene:
        """The subject at a random place before a background."""
        seed = int(rng.integers(2**31))
        if self.is_critter:
            return Scene("critter", background=background, color=self.attributes["color"],
                         attributes=self.critter_parts, body=self.body, seed=seed)  # fmt: skip
        radius = float(rng.uniform(*self.radius))
        slack = 0.5 * (0.47 - radius)
        thing = Thing(
            self.attributes["shape"], self.attributes["color"], self.attributes["texture"], self.second_color, "medium",
            0.5 + float(rng.uniform(-slack, slack)), 0.5 + float(rng.uniform(-slack, slack)), radius,
            float(rng.uniform(-0.12, 0.12)),
        )  # fmt: skip
        return Scene("object", things=(thing,), background=background, seed=seed)

    def backgrounds(self) -> list[str]:
        """Plain colours from which both colours of the subject stand out."""
        clear = contrasting(self.attributes["color"])
        if self.is_critter:
            return clear
        return [name for name in clear if name != self.second_color and name in contrasting(self.second_color)]


def _object_subjects() -> list[Subject]:
    found = []
    for i, shape in enumerate(ROOMY_SHAPES):
        for j, texture in enumerate(v.HELD_OUT_TEXTURES):
            for step in (0, 2):
                color = tuple(v.HELD_OUT_COLORS)[(i + j + step) % len(v.HELD_OUT_COLORS)]
                second = "white" if "white" in contrasting(color) else "black"
                looks = {"shape": shape, "color": color, "texture": texture}
                found.append(Subject(f"{color}-{texture}-{shape}", shape, looks, second))
    return found


def _critter_subjects(count: int = 24) -> list[Subject]:
    found = []
    for i in range(count):
        rng = np.random.default_rng([24, i])
        parts = tuple(a for a in v.CRITTER_ATTRIBUTES if rng.random() < 0.4) or ("horns",)
        color = [c for c in v.COLORS if c not in ("black", "white")][int(rng.integers(10))]
        body = tuple(round(float(x), 3) for x in rng.uniform(0, 1, len(v.CRITTER_BODY)))
        shown = {f"critter_{a}": "present" if a in parts else "absent" for a in v.CRITTER_ATTRIBUTES}
        found.append(Subject(f"critter-{i:02d}", "critter", {"color": color, **shown}, "white", parts, body))
    return found


def _small_subjects() -> list[Subject]:
    """Plain shapes in a held-out colour, small enough for two in a picture."""
    looks = zip(("circle", "oval", "hexagon", "heart"), ("lime", "navy", "maroon", "olive"), strict=True)
    return [
        Subject(f"small-{color}-{shape}", shape, {"shape": shape, "color": color, "texture": "flat"},
                "white" if "white" in contrasting(color) else "black", radius=(0.17, 0.26))
        for shape, color in looks
    ]  # fmt: skip


HELD_OUT_CONCEPTS: dict[str, Subject] = {
    s.name: s for s in (*_object_subjects(), *_critter_subjects(), *_small_subjects())
}
QUICKSTART_SUBJECT = HELD_OUT_CONCEPTS["critter-03"]
SUBJECTS_FOR_SCIENCE: tuple[str, ...] = (
    "lime-zigzag-circle", "navy-halved-oval", "maroon-framed-hexagon", "olive-zigzag-heart", "critter-03",
    "critter-11",
)  # fmt: skip


def subject_pictures(
    subject: Subject | str, count: int, seed: int = 0, backgrounds: tuple[str, ...] | None = None, size: int = 64
) -> Pictures:
    """Render `count` pictures of one subject, on its backgrounds in turn or on those given.

    Raises:
        KeyError: No subject has that name.
    """
    if isinstance(subject, str):
        subject = HELD_OUT_CONCEPTS[subject]
    rng = np.random.default_rng([seed, 5])
    pool = list(backgrounds) if backgrounds else [str(b) for b in rng.permutation(subject.backgrounds())]
    scenes = [subject.scene(pool[i % len(pool)], rng) for i in range(count)]
    return Pictures(np.stack([render(scene, size) for scene in scenes]), scenes)


def class_pictures(subject: Subject, count: int, seed: int = 0) -> Pictures:
    """Render `count` pictures of a subject's class as the base knows it: a regularization set."""
    rng = np.random.default_rng([seed, 6])
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = sample_split(rng, "train", kind="critter" if subject.is_critter else "object")
        if subject.is_critter or scene.things[0].shape == subject.class_noun:
            scenes.append(scene)
    return Pictures(np.stack([render(scene) for scene in scenes]), scenes)


def write_photos(subject: Subject, folder: Path, count: int, seed: int, word: str) -> Pictures:
    """Write `count` pictures of a subject, `NAME.png`, with captions beside them, `NAME.txt`.

    A caption says the new word, the class and the background: what it says of the background need not be
    learned as part of the subject.
    """
    pictures = subject_pictures(subject, count, seed)
    called = f"photo of a {word} {subject.class_noun}"
    captions = [f"{called} {background_phrase(scene.background)}" for scene in pictures.scenes]
    write_photos_with(captions, pictures, folder)
    return pictures
