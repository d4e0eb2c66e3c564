"""A population of critters, each an identity of its own: the people of a corpus of adapters.

Colour, eight binary parts and seven body parameters are drawn by the identity's number, the parts evenly; so the
labels of a corpus of any size are known, and a larger corpus begins with the smaller one.
"""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lit_personalize import atomic
from lit_personalize.errors import UsageError
from lit_personalize.tinyworld import vocabulary as v
from lit_personalize.tinyworld.captions import background_phrase
from lit_personalize.tinyworld.concepts import Subject, subject_pictures
from lit_personalize.tinyworld.dataset import write_photos_with
from lit_personalize.tinyworld.render import render

COLORS: tuple[str, ...] = tuple(color for color in v.COLORS if color not in ("black", "white"))
WORD = "sks"
TABLE = "people.csv"
TRAINING_SEED = 0
"""One for all adapters, as Weights2Weights trains them: the same noise at the same steps."""


def identity(number: int) -> Subject:
    """The critter of that number, the same on every machine."""
    rng = np.random.default_rng([26, number])
    parts = tuple(a for a in v.CRITTER_ATTRIBUTES if rng.random() < 0.5)
    color = COLORS[int(rng.integers(len(COLORS)))]
    body = tuple(round(float(x), 3) for x in rng.uniform(0, 1, len(v.CRITTER_BODY)))
    return of_parts(f"identity-{number:05d}", color, parts, body)


def of_parts(name: str, color: str, parts: Sequence[str], body: tuple[float, ...]) -> Subject:
    """A critter with these attributes, in the order of the vocabulary."""
    parts = tuple(a for a in v.CRITTER_ATTRIBUTES if a in parts)
    shown = {f"critter_{a}": "present" if a in parts else "absent" for a in v.CRITTER_ATTRIBUTES}
    return Subject(name, "critter", {"color": color, **shown}, "white", parts, body)


def labels_of(subject: Subject) -> dict[str, float]:
    """Binary attributes as 0 and 1, one column for each colour, and the body's parameters in [0, 1]."""
    found: dict[str, float] = {a: float(a in subject.critter_parts) for a in v.CRITTER_ATTRIBUTES}
    found |= {f"color_{color}": float(subject.attributes["color"] == color) for color in COLORS}
    return found | dict(zip((f"body_{name}" for name in v.CRITTER_BODY), subject.body, strict=True))


def captions_of(subject: Subject, backgrounds: Sequence[str]) -> list[str]:
    """What the pictures before these backgrounds are captioned; a background that is said is not learned."""
    return [f"photo of a {WORD} {subject.class_noun} {background_phrase(name)}" for name in backgrounds]


def write_people(folder: Path, count: int, start: int = 0, pictures: int = 10, size: int = 64) -> Path:
    """Write a folder of captioned pictures for each identity, and `people.csv` with seeds and labels beside them.

    Folders that are there are kept, so a larger count goes on.

    Raises:
        UsageError: Nothing is asked for.
    """
    if count < 1 or pictures < 1 or start < 0:
        raise UsageError(f"give at least one identity and one picture of each, not {count} and {pictures}")
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for number in range(start, start + count):
        subject = identity(number)
        place = folder / subject.name
        if not place.is_dir():
            staged = folder / f".tmp-{subject.name}"
            shutil.rmtree(staged, ignore_errors=True)
            shown = subject_pictures(subject, pictures, number, size=size)
            write_photos_with(captions_of(subject, [s.background for s in shown.scenes]), shown, staged)
            os.rename(staged, place)
        told = {"id": subject.name, "images": subject.name, "class_noun": subject.class_noun, "seed": TRAINING_SEED}
        rows.append({**told, **{name: f"{value:g}" for name, value in labels_of(subject).items()}})
    table = folder / TABLE
    with atomic.replacing(table) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return table


def with_part(subject: Subject, part: str, present: bool) -> Subject:
    """The same critter with or without a part."""
    parts = [*subject.critter_parts, part] if present else [a for a in subject.critter_parts if a != part]
    return of_parts(subject.name, subject.attributes["color"], parts, subject.body)


def shown_before(subject: Subject, backgrounds: Sequence[str], seed: int = 900) -> Iterator[np.ndarray]:
    """Real renders of a subject, uint8 `[S, S, 3]`, one before each background."""
    for number, background in enumerate(backgrounds):
        yield render(subject.scene(background, np.random.default_rng([seed, number])))
