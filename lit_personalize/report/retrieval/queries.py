"""What is looked for in the corpus: every query with the facts that make a picture relevant.

A picture is relevant if it shows all the facts that are asked, whatever its caption says. Every narrow query is also
asked by one picture and by several together, as a folder of photos would: rendered ones, not of the corpus, that show
the asked facts, and else whatever their scenes drew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lit_personalize.tinyworld import vocabulary as v
from lit_personalize.tinyworld.captions import with_article
from lit_personalize.tinyworld.paraphrases import Facts, facts
from lit_personalize.tinyworld.scene import Kind, Scene, sample_scene

PICTURE_SEED = 1_000_003
"""Of the pictures that ask; the corpus has other seeds."""
UNSAYING = frozenset("a an the of in on at with and to photo picture image".split())
"""Words of a query that a search for words leaves out."""


@dataclass(frozen=True)
class Asked:
    """A query.

    Args:
        group: What its kind of query asks for.
        text: As one would type it; also what the search for words gets where pictures ask.
        facts: Of a relevant picture.
        pictures: How many pictures that show the facts ask together; none, where the text does.
    """

    group: str
    text: str
    facts: Facts
    pictures: int = 0

    @property
    def name(self) -> str:
        """What the retrieved set calls it: a folder's name for pictures."""
        return "-".join([*self.text.split(), str(self.pictures)]) if self.pictures else self.text

    @property
    def words(self) -> tuple[str, ...]:
        """What a search for words looks for: each of them must be there."""
        return tuple(word for word in self.text.split() if word not in UNSAYING)


NARROW = ("shape, colour", "shape, texture", "critter, colour, two parts", "critter, part, place",
          "person, part, place", "sign, letter")  # fmt: skip
"""Groups of 150 to 350 relevant pictures in 100,000."""
CLASS = "class alone"
BY = (0, 1, 4)
"""By how many pictures a narrow query is asked; none: by its text. Four, since concepts come with three to five."""


def asked() -> list[Asked]:
    """All queries: every shape, place, part, base colour and texture in turn, none chosen by how well it is found."""
    narrow, classes = list(_narrow()), list(_classes())
    found = [Asked(group, text, frozenset(shown), by) for by in BY for group, text, shown in narrow]
    return found + [Asked(CLASS, text, frozenset(shown)) for text, shown in classes]


def _narrow() -> Iterator[tuple[str, str, set[tuple[str, str]]]]:
    colors, textures = list(v.COLORS), [t for t in v.ALL_TEXTURES if t != "flat"]
    parts, worn, places = list(v.CRITTER_ATTRIBUTES), list(v.PERSON_ATTRIBUTES), list(v.PLACES)
    for i, shape in enumerate(v.ALL_SHAPES):
        thing, color, texture = {("kind", "object"), ("shape", shape)}, _nth(colors, i), _nth(textures, i)
        yield NARROW[0], f"a photo of {with_article(color)} {shape}", thing | {("color", color)}
        yield NARROW[1], f"a photo of {with_article(texture)} {shape}", thing | {("texture", texture)}
    for i, color in enumerate(color for color in colors if color != "black"):  # no critter is black
        first, second = _nth(parts, i), _nth(parts, i + 3)
        text = f"{with_article(color)} critter with {v.CRITTER_ATTRIBUTES[first]} and {v.CRITTER_ATTRIBUTES[second]}"
        yield NARROW[2], text, {("kind", "critter"), ("color", color), ("part", first), ("part", second)}
    for i, place in enumerate(places):
        for group, kind, part, table in ((NARROW[3], "critter", _nth(parts, i), v.CRITTER_ATTRIBUTES),
                                         (NARROW[4], "person", _nth(worn, i), v.PERSON_ATTRIBUTES)):  # fmt: skip
            text = f"a {kind} with {table[part]} {v.PLACES[place]}"
            yield group, text, {("kind", kind), ("part", part), ("background", place)}
    for glyph in v.GLYPHS:
        if glyph != "A":  # in a caption a word of its own
            yield NARROW[5], f"a sign saying {glyph.lower()}", {("kind", "sign"), ("text", glyph)}


def _classes() -> Iterator[tuple[str, set[tuple[str, str]]]]:
    for shape in v.ALL_SHAPES:
        yield f"a photo of {with_article(shape)}", {("kind", "object"), ("shape", shape)}
    for kind in ("critter", "person", "sign"):
        yield f"a photo of a {kind}", {("kind", kind)}


def _nth(values: list[str], number: int) -> str:
    return values[number % len(values)]


def scenes_showing(query: Asked, number: int) -> list[Scene]:
    """The scenes that ask the `number`-th query: the first of its generator that show the facts."""
    if not query.pictures:
        return []
    rng = np.random.default_rng([PICTURE_SEED, number])
    kind: Kind = dict(query.facts)["kind"]  # type: ignore[assignment]
    found: list[Scene] = []
    while len(found) < query.pictures:
        scene = sample_scene(rng, "all", kind)
        if scene.style == "photo" and query.facts <= facts(scene):
            found.append(scene)
    return found
