"""The tables of tinyworld: every attribute, its words, and which of them the base never sees.

The first word of each entry is its name; the others are synonyms that captions may use. Names in
``HELD_OUT_*`` are drawn by the renderer and known to the reader and to the metric CLIP, but no
training picture of the base contains them: they are what personalization has to teach.
"""

from __future__ import annotations

# RGB in [0, 1]. Chosen so that any two are at least 0.25 apart in RGB distance.
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.87, 0.13, 0.13),
    "green": (0.13, 0.62, 0.22),
    "blue": (0.13, 0.28, 0.85),
    "yellow": (0.97, 0.86, 0.15),
    "purple": (0.50, 0.16, 0.66),
    "orange": (0.97, 0.53, 0.08),
    "white": (0.96, 0.96, 0.96),
    "black": (0.07, 0.07, 0.07),
    "pink": (0.98, 0.60, 0.76),
    "cyan": (0.20, 0.80, 0.88),
    "brown": (0.48, 0.28, 0.11),
    "gray": (0.55, 0.55, 0.55),
}
HELD_OUT_COLORS: dict[str, tuple[float, float, float]] = {
    "lime": (0.65, 0.95, 0.10),
    "maroon": (0.45, 0.02, 0.20),
    "navy": (0.04, 0.06, 0.40),
    "olive": (0.48, 0.50, 0.08),
}

COLOR_SYNONYMS: dict[str, tuple[str, ...]] = {
    "red": ("scarlet",),
    "blue": ("azure",),
    "purple": ("violet",),
    "cyan": ("turquoise",),
    "gray": ("grey",),
}

# Near neighbours stand side by side: circle/ring/oval, square/diamond/hexagon, star/flower.
SHAPES: tuple[str, ...] = (
    "circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond",
    "hexagon", "crescent", "arrow", "oval",
)  # fmt: skip
HELD_OUT_SHAPES: tuple[str, ...] = ("gear", "clover", "bolt", "drop", "house", "hourglass")
SHAPE_SYNONYMS: dict[str, tuple[str, ...]] = {
    "circle": ("disc",),
    "square": ("box",),
    "cross": ("plus",),
    "diamond": ("rhombus",),
    "crescent": ("moon",),
    "oval": ("ellipse",),
}

TEXTURES: tuple[str, ...] = ("flat", "striped", "dotted", "checkered")
HELD_OUT_TEXTURES: tuple[str, ...] = ("zigzag", "framed", "halved")
TEXTURE_SYNONYMS: dict[str, tuple[str, ...]] = {
    "striped": ("stripy",),
    "dotted": ("spotted",),
    "checkered": ("chequered",),
}

# Backgrounds are either a colour or one of these places.
PLACES: dict[str, str] = {
    "beach": "on the beach",
    "forest": "in the forest",
    "snow": "in the snow",
    "night": "at night",
    "desert": "in the desert",
    "city": "in the city",
    "meadow": "in the meadow",
    "sea": "in the sea",
}

SIZES: tuple[str, ...] = ("small", "medium", "large")
SIZE_SYNONYMS: dict[str, tuple[str, ...]] = {"small": ("little",), "large": ("big",)}

STYLES: tuple[str, ...] = ("photo", "cartoon", "pixel", "watercolor", "monochrome", "sepia", "pastel", "neon", "mosaic")
HELD_OUT_STYLES: tuple[str, ...] = ("blueprint", "halftone", "negative", "posterized")

RELATIONS: dict[str, str] = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
}

# Binary attributes: the phrase that a caption uses when the attribute is present.
CRITTER_ATTRIBUTES: dict[str, str] = {
    "horns": "horns",
    "wings": "wings",
    "tail": "a tail",
    "spots": "spots",
    "hat": "a hat",
    "glasses": "glasses",
    "beard": "a beard",
    "antennae": "antennae",
}
# Continuous body parameters in [0, 1]; together with colour and attributes they are an identity.
CRITTER_BODY: tuple[str, ...] = ("width", "height", "squareness", "eye_size", "eye_distance", "ear_length", "hue_shift")
CRITTER_WORDS: tuple[str, ...] = ("critter", "creature")

PERSON_ATTRIBUTES: dict[str, str] = {
    "hat": "a hat",
    "glasses": "glasses",
    "beard": "a beard",
    "scarf": "a scarf",
    "longhair": "long hair",
}
PERSON_WORDS: tuple[str, ...] = ("person", "human")

GLYPHS: tuple[str, ...] = ("A", "C", "E", "H", "K", "L", "O", "T", "X", "Z")
SIGN_WORDS: tuple[str, ...] = ("sign", "board")

ALL_COLORS: dict[str, tuple[float, float, float]] = {**COLORS, **HELD_OUT_COLORS}
ALL_SHAPES: tuple[str, ...] = SHAPES + HELD_OUT_SHAPES
ALL_TEXTURES: tuple[str, ...] = TEXTURES + HELD_OUT_TEXTURES
ALL_STYLES: tuple[str, ...] = STYLES + HELD_OUT_STYLES

# Classes that look alike: used to measure how far an edit or an erasure spreads.
NEIGHBORS: dict[str, tuple[str, ...]] = {
    "circle": ("oval", "ring"),
    "ring": ("circle", "oval"),
    "square": ("diamond", "hexagon"),
    "hexagon": ("circle", "square"),
    "diamond": ("square", "triangle"),
    "triangle": ("arrow", "diamond"),
    "heart": ("triangle", "clover"),
    "star": ("cross", "gear"),
}
