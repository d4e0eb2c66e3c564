"""The embedded world's own suite: prompts that training never showed, and what the reader finds in their pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lit_personalize.metrics.evaluation import Figure
from lit_personalize.tinyworld import vocabulary as v
from lit_personalize.tinyworld.concepts import Subject, subject_pictures
from lit_personalize.tinyworld.reader import Reader

GROUNDS = ("red", "blue", "black", "orange", "pink", "purple", "gray", "cyan")
PLACES = ("beach", "forest", "snow", "night")


def prompts_of(subject: Subject, token: str) -> list[tuple[str, str]]:
    """Prompts for a subject, each with the background that it asks for."""
    clear = [ground for ground in GROUNDS if ground in subject.backgrounds()]
    return [(f"a {token} {subject.class_noun} on a {ground} background", ground) for ground in clear] + [
        (f"a {token} {subject.class_noun} {v.PLACES[place]}", place) for place in PLACES
    ]


def shares(pixels: np.ndarray, subject: Subject, grounds: Sequence[str], reader: Reader) -> dict[str, float]:
    """What the reader finds in pictures `[N, 64, 64, 3]`, each in [0, 1].

    "attributes" is the share of the subject's attributes that are read as they should be, "all attributes"
    that of pictures in which all are, "background" that of pictures with the background in `grounds`.
    "unclear" is never right.
    """
    readings = reader.read(pixels)
    found = [np.mean([r[head] == value for head, value in subject.attributes.items()]) for r in readings]
    return {
        "attributes": float(np.mean(found)),
        "all attributes": float(np.mean([share == 1 for share in found])),
        "background": float(np.mean([r["background"] == g for r, g in zip(readings, grounds, strict=True)])),
    }


def asked_pictures(subject: Subject, grounds: Sequence[str]) -> np.ndarray:
    """Real renders of a subject, one before each background: uint8 `[N, 64, 64, 3]`."""
    return np.concatenate([subject_pictures(subject, 1, 900 + i, (g,)).pixels for i, g in enumerate(grounds)])


def figures_by_reader(
    subject: Subject, grounds: Sequence[str], reader: Reader
) -> Callable[[np.ndarray, np.ndarray], dict[str, Figure]]:
    """A function of (adapter's pictures, untouched base's pictures) that gives `shares` beside real renders."""
    real = asked_pictures(subject, grounds)

    def measure(generated: np.ndarray, floor: np.ndarray) -> dict[str, Figure]:
        value, oracle, low = (shares(pixels, subject, grounds, reader) for pixels in (generated, real, floor))
        return {name: Figure(value[name], oracle[name], low[name], len(generated), "reader") for name in value}

    return measure
