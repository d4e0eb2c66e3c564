"""Two subjects in one scene: how it is asked for, how it is drawn, and what the reader finds of both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from lit_personalize.tinyworld import vocabulary as v
from lit_personalize.tinyworld.attributes import Reading
from lit_personalize.tinyworld.concepts import Subject
from lit_personalize.tinyworld.reader import Reader
from lit_personalize.tinyworld.scene import Scene, Thing
from lit_personalize.tinyworld.suite import GROUNDS

PER_RELATION = 4
RADIUS, OFFSET = 0.18, 0.235
APART = 0.25
"""Distance in RGB, each channel in [0, 1], of what is not background."""


def asked_pairs(first: Subject, second: Subject) -> list[tuple[str, str]]:
    """Every relation before several grounds on which both subjects are seen: (relation, ground).

    Only objects: the reader does not look for critters in pairs.
    """
    clear = [ground for ground in GROUNDS if ground in first.backgrounds() and ground in second.backgrounds()]
    return [(relation, clear[i % len(clear)]) for relation in v.RELATIONS for i in range(PER_RELATION)]


def pair_prompt(first: str, second: str, relation: str, ground: str) -> str:
    """For example "a <new1> circle to the left of a <new2> heart on a red background"."""
    return f"a {first} {v.RELATIONS[relation]} a {second} on a {ground} background".replace(" a orange", " an orange")


def pair_scene(first: Subject, second: Subject, relation: str, ground: str) -> Scene:
    """The two subjects beside or above each other, as pairs of the training set are."""
    side = -OFFSET if relation in ("left", "above") else OFFSET
    across = relation in ("left", "right")
    things = []
    for subject, shift in ((first, side), (second, -side)):
        looks = subject.attributes
        x, y = (0.5 + shift, 0.5) if across else (0.5, 0.5 + shift)
        shown = (looks["shape"], looks["color"], looks["texture"], subject.second_color)
        things.append(Thing(*shown, "small", x, y, RADIUS))
    return Scene("pair", things=tuple(things), background=ground, relation=relation)


def pair_shares(
    pixels: np.ndarray, first: Subject, second: Subject, asked: Sequence[tuple[str, str]], reader: Reader
) -> dict[str, float]:
    """What the reader finds in pictures `[N, 64, 64, 3]`, each in [0, 1].

    Each half of a picture is enlarged and read by itself as a single object; the order that fits better counts.
    "attributes" is the share of both subjects' attributes that are right, "both subjects" that of pictures in which
    neither lacks one. By colour alone, counted in pixels: "one colour" and "both colours" are the shares of pictures
    with at least one, or both, of the subjects' colours in a half of its own. "background" is read off the whole.
    """
    halves = [np.stack([half(p, r, i) for p, (r, _) in zip(pixels, asked, strict=True)]) for i in (0, 1)]
    rows = []
    for one, other, reading, *parts, (_, ground) in zip(
        *map(reader.read, halves), reader.read(pixels), *halves, asked, strict=True
    ):
        orders = ((first, second), (second, first))
        share, whole = max(_found((one, other), pair) for pair in orders)
        best = max(sum(has_color(part, s, ground) for part, s in zip(parts, pair, strict=True)) for pair in orders)
        rows.append((share, whole, best >= 1, best == 2, reading["background"] == ground))
    names = ("attributes", "both subjects", "one colour", "both colours", "background")
    return {name: float(np.mean([row[i] for row in rows])) for i, name in enumerate(names)}


def has_color(part: np.ndarray, subject: Subject, ground: str) -> bool:
    """Whether the subject's colour is nearest to a fifth of what is no background, and a fiftieth of all pixels."""
    unit = part.reshape(-1, 3) / 255
    names = list(v.ALL_COLORS)
    table = np.array([v.ALL_COLORS[name] for name in names])
    nearest = np.linalg.norm(unit[:, None] - table, axis=2).argmin(1)
    apart = np.linalg.norm(unit - table[names.index(ground)], axis=1) > APART
    own = int((apart & (nearest == names.index(subject.attributes["color"]))).sum())
    return own >= max(0.2 * int(apart.sum()), len(unit) / 50)


def half(picture: np.ndarray, relation: str, which: int) -> np.ndarray:
    """The left or upper (0) or the other (1) half of `[S, S, 3]`, without its far ends, in the size of the whole."""
    side = len(picture) // 2
    start, middle = which * side, side // 2
    x, y = (start, middle) if relation in ("left", "right") else (middle, start)
    part = Image.fromarray(picture[y : y + side, x : x + side])
    return np.asarray(part.resize(picture.shape[1::-1], Image.Resampling.BICUBIC))


def _found(readings: Sequence[Reading], subjects: Sequence[Subject]) -> tuple[float, bool]:
    right = [[reading[head] == value for head, value in subject.attributes.items()]
             for reading, subject in zip(readings, subjects, strict=True)]  # fmt: skip
    return float(np.mean([np.mean(part) for part in right])), all(map(all, right))
