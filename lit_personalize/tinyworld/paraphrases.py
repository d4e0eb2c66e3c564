"""Captions as the web writes them: what a picture shows is named, paraphrased or left out.

The corpus on which retrieval is measured, and the CLIP that ranks it, take their captions from here. A class
is often not named ("love symbol" for a heart), a caption may name a class that the picture does not show
("star rated"), and colour, background, texture, parts and style may be missing.
"""

from __future__ import annotations

import numpy as np

from lit_personalize.tinyworld import vocabulary as v
from lit_personalize.tinyworld.captions import list_phrase, with_article
from lit_personalize.tinyworld.scene import Scene, Thing

Facts = frozenset[tuple[str, str]]

# Ways to say a class without its noun, and without any part of it.
INDIRECT: dict[str, tuple[str, ...]] = {
    "circle": ("disc", "round spot", "full moon shape"),
    "square": ("box", "four equal sides"),
    "triangle": ("three corners", "pyramid", "warning shape"),
    "star": ("five points", "sheriff badge", "asterisk"),
    "heart": ("love symbol", "valentine", "like button"),
    "ring": ("hoop", "round band", "donut outline"),
    "cross": ("plus", "first aid symbol"),
    "diamond": ("rhombus", "lozenge", "kite shape"),
    "hexagon": ("six sides", "honeycomb cell"),
    "crescent": ("new moon", "sickle"),
    "arrow": ("pointer", "this way up symbol"),
    "oval": ("ellipse", "egg shape"),
    "gear": ("cog", "toothed wheel", "settings symbol"),
    "clover": ("shamrock", "lucky leaf"),
    "bolt": ("lightning", "thunder flash"),
    "drop": ("tear", "bead of water"),
    "house": ("home", "cottage"),
    "hourglass": ("sand timer", "egg timer"),
    "critter": ("creature", "little monster", "animal", "furry friend"),
    "person": ("human", "somebody", "portrait of a neighbour"),
    "sign": ("board", "placard"),
}
# Words with a class noun in them that say nothing about the picture.
DECOYS: tuple[str, ...] = (
    "hearty breakfast blog", "heart of the city tours", "star rated seller", "starter kit", "circle line",
    "full circle design", "square one", "square deal", "cross section", "crossword", "ring road", "spring offer",
    "diamond anniversary", "arrowroot", "triangle trade route", "good cheer house", "drop shipping",
    "person finder", "critter control", "signature edition", "gear up", "bolt on", "clover street",
)  # fmt: skip
SPECIFICS_SHARE, INDIRECT_SHARE, DECOY_SHARE = 0.75, 0.6, 0.08
SENTENCES = ("{}", "{}", "a photo of {}", "photo of {}", "picture of {}", "{} stock photo", "free image of {}")


def facts(scene: Scene) -> Facts:
    """What is true of a picture, as (aspect, value) pairs."""
    found = {("kind", scene.kind), ("background", scene.background), ("style", scene.style)}
    for thing in scene.things:
        found |= {("shape", thing.shape), ("color", thing.color), ("texture", thing.texture), ("size", thing.size)}
    found |= {("part", part) for part in scene.attributes}
    for aspect in ("color", "text", "relation"):
        if getattr(scene, aspect):
            found.add((aspect, getattr(scene, aspect)))
    return frozenset(found)


def alt_text(scene: Scene, rng: np.random.Generator) -> tuple[str, Facts]:
    """One caption and the facts that it says; it is true of every picture whose `facts` include them."""
    said: set[tuple[str, str]] = {("kind", scene.kind)}
    if scene.things:
        phrases = [_thing(thing, rng, said) for thing in scene.things]
        body = phrases[0]
        if len(phrases) == 2:
            said.add(("relation", scene.relation))
            body = f"{phrases[0]} {v.RELATIONS[scene.relation]} {phrases[1]}"
    else:
        body = _being(scene, rng, said)
    if _says(rng):
        said.add(("background", scene.background))
        body += " " + v.PLACES.get(scene.background, f"on {_word(scene.background, v.COLOR_SYNONYMS, rng)}")
    if scene.style != "photo" and _says(rng):
        said.add(("style", scene.style))
        body += f", {scene.style} style"
    sentence = str(rng.choice(SENTENCES)).format(body)
    if rng.random() < DECOY_SHARE:
        sentence += f", {rng.choice(DECOYS)}"
    return sentence, frozenset(said)


def _says(rng: np.random.Generator) -> bool:
    return bool(rng.random() < SPECIFICS_SHARE)


def _word(name: str, synonyms: dict[str, tuple[str, ...]], rng: np.random.Generator) -> str:
    return str(rng.choice((name, *synonyms.get(name, ()))))


def _noun(name: str, rng: np.random.Generator) -> str:
    return str(rng.choice(INDIRECT[name])) if rng.random() < INDIRECT_SHARE else name


def _thing(thing: Thing, rng: np.random.Generator, said: set[tuple[str, str]]) -> str:
    said.add(("shape", thing.shape))
    words = []
    for aspect, plain, synonyms in (("size", "medium", v.SIZE_SYNONYMS), ("color", "", v.COLOR_SYNONYMS),
                                    ("texture", "flat", v.TEXTURE_SYNONYMS)):  # fmt: skip
        value = getattr(thing, aspect)
        if value != plain and _says(rng):
            said.add((aspect, value))
            words.append(_word(value, synonyms, rng))
    noun = _noun(thing.shape, rng)
    if rng.random() < 0.3 and words:  # as tags
        return ", ".join([noun, *words])
    return with_article(" ".join([*words, noun]))


def _being(scene: Scene, rng: np.random.Generator, said: set[tuple[str, str]]) -> str:
    noun, color = _noun(scene.kind, rng), _word(scene.color, v.COLOR_SYNONYMS, rng)
    phrase = with_article(noun)
    if _says(rng):
        said.add(("color", scene.color))
        clothed = f"{with_article(noun)} in {color} clothes"
        phrase = clothed if scene.kind == "person" else with_article(f"{color} {noun}")
    if scene.kind == "sign":
        said.add(("text", scene.text))
        return f"{phrase} saying {' '.join(scene.text.lower())}"
    parts = [part for part in scene.attributes if _says(rng)]
    said |= {("part", part) for part in parts}
    table = v.CRITTER_ATTRIBUTES if scene.kind == "critter" else v.PERSON_ATTRIBUTES
    return f"{phrase} with {list_phrase([table[part] for part in parts])}" if parts else phrase
