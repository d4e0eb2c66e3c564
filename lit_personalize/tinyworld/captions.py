"""The caption grammar: a sentence for every scene, with synonyms drawn at random or left out.

`caption(scene)` without a generator gives the plain form ("a red circle on a blue background").
With one, a colour or a list of parts is left unsaid now and then, so that class prompts
("a photo of a critter", "a circle on the beach") are sentences that the base knows.
"""

from __future__ import annotations

import numpy as np

from lit_personalize.tinyworld import vocabulary as v
from lit_personalize.tinyworld.scene import Scene, Thing

OPENINGS = ("a photo of", "a picture of", "an image of", "a rendering of", "photo of", "the picture of")
STYLE_PHRASES = ("in {} style", "in the style of {}")
BACKGROUND_PHRASES = ("on a {} background", "in front of a {} background", "with a {} backdrop")
UNSAID_SHARE = 0.1  # of captions without the subject's colour, and of those without its parts
TEXTURE_PHRASES: dict[str, str] = {
    "striped": "with stripes", "dotted": "with dots", "checkered": "with checks",
    "zigzag": "with zigzags", "framed": "with a frame", "halved": "in two halves",
}  # fmt: skip


def with_article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _word(name: str, synonyms: dict[str, tuple[str, ...]], rng: np.random.Generator | None) -> str:
    others = synonyms.get(name, ())
    if rng is None or not others or rng.random() < 0.75:
        return name
    return others[int(rng.integers(len(others)))]


def _unsaid(rng: np.random.Generator | None) -> bool:
    return rng is not None and rng.random() < UNSAID_SHARE


def _pick(rng: np.random.Generator | None, options: tuple[str, ...]) -> str:
    return options[0] if rng is None else options[int(rng.integers(len(options)))]


def background_phrase(name: str, rng: np.random.Generator | None = None) -> str:
    if name in v.PLACES:
        return v.PLACES[name]
    phrase = _pick(rng, BACKGROUND_PHRASES) if rng is None or rng.random() < 0.4 else BACKGROUND_PHRASES[0]
    color = _word(name, v.COLOR_SYNONYMS, rng)
    return phrase.format(color) if color[0] not in "aeiou" else phrase.replace(" a ", " an ", 1).format(color)


def thing_phrase(thing: Thing, rng: np.random.Generator | None = None) -> str:
    """The noun phrase without article: "red striped circle"."""
    words, tail = [], ""
    if thing.size != "medium" and (rng is None or rng.random() < 0.8):
        words.append(_word(thing.size, v.SIZE_SYNONYMS, rng))
    if not _unsaid(rng):
        words.append(_word(thing.color, v.COLOR_SYNONYMS, rng))
    if thing.texture != "flat":
        if rng is None or rng.random() < 0.7:
            words.append(_word(thing.texture, v.TEXTURE_SYNONYMS, rng))
        else:
            tail = " " + TEXTURE_PHRASES[thing.texture]
    words.append(_word(thing.shape, v.SHAPE_SYNONYMS, rng))
    return " ".join(words) + tail


def list_phrase(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def subject_phrase(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """What the picture shows, without background and style."""
    if scene.kind == "object":
        return with_article(thing_phrase(scene.things[0], rng))
    if scene.kind == "pair":
        first, second = (with_article(thing_phrase(_unsized(t), rng)) for t in scene.things)
        return f"{first} {v.RELATIONS[scene.relation]} {second}"
    if scene.kind == "sign":
        board = with_article(f"{_word(scene.color, v.COLOR_SYNONYMS, rng)} {_pick(rng, v.SIGN_WORDS)}")
        return f"{board} with the letter{'s' if len(scene.text) > 1 else ''} {' '.join(scene.text.lower())}"
    color = _word(scene.color, v.COLOR_SYNONYMS, rng)
    bare = _unsaid(rng)
    if scene.kind == "critter":
        noun, table = _pick(rng, v.CRITTER_WORDS), v.CRITTER_ATTRIBUTES
        phrase = with_article(noun if bare else f"{color} {noun}")
    else:
        noun, table = _pick(rng, v.PERSON_WORDS), v.PERSON_ATTRIBUTES
        phrase = with_article(noun if bare else f"{noun} in {color} clothes")
    if not scene.attributes or _unsaid(rng):
        return phrase
    return f"{phrase} with {list_phrase([table[a] for a in scene.attributes])}"


def _unsized(thing: Thing) -> Thing:
    return Thing(thing.shape, thing.color, thing.texture)


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """One sentence in lower case for `scene`; with `rng`, one of many ways to say it."""
    sentence = subject_phrase(scene, rng)
    if rng is not None and rng.random() < 0.5:
        sentence = f"{_pick(rng, OPENINGS)} {sentence}"
    sentence = f"{sentence} {background_phrase(scene.background, rng)}"
    if scene.style != "photo":
        sentence = f"{sentence} {_pick(rng, STYLE_PHRASES).format(scene.style)}"
    return sentence
