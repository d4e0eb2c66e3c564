"""What can be read off a tinyworld picture: the reader's heads, their classes, and a scene's true values.

`targets` is the only place that says which attribute of which scene is visible at all. An attribute
that the drawing hides (a white beard on a white critter, colours in a monochrome picture) has no
target: it is neither taught nor scored.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lit_personalize.tinyworld import vocabulary as v
from lit_personalize.tinyworld.scene import PLACE_CLASHES, Scene, Thing

UNCLEAR = "unclear"
NONE = "none"
KINDS = ("object", "pair", "critter", "person", "sign")

_COLORS = (*v.ALL_COLORS, UNCLEAR)
_SHAPES = (*v.ALL_SHAPES, UNCLEAR)
_LETTERS = (*v.GLYPHS, NONE, UNCLEAR)
HEADS: dict[str, tuple[str, ...]] = {
    "kind": (*KINDS, UNCLEAR),
    "shape": _SHAPES,
    "color": _COLORS,
    "texture": (*v.ALL_TEXTURES, UNCLEAR),
    "background": (*v.COLORS, *v.HELD_OUT_COLORS, *v.PLACES, UNCLEAR),
    "size": v.SIZES,
    "style": (*v.ALL_STYLES, UNCLEAR),
    "second_shape": _SHAPES,
    "second_color": _COLORS,
    "relation": ("left", "above"),  # of the first thing; pairs are read from the left, or from above
    "letter_1": _LETTERS,
    "letter_2": _LETTERS,
    **{f"critter_{name}": ("absent", "present") for name in v.CRITTER_ATTRIBUTES},
    **{f"person_{name}": ("absent", "present") for name in v.PERSON_ATTRIBUTES},
}

COLORLESS_STYLES = ("monochrome", "sepia", "neon", "blueprint", "halftone", "negative", "posterized")
COARSE_STYLES = ("pixel", "watercolor", "mosaic", "halftone")
# Too thin for two frames: hardly anything of their own colour stays.
THIN_SHAPES = ("ring", "cross", "crescent", "arrow", "star", "bolt", "gear", "clover")


@dataclass(frozen=True)
class Reading:
    """Predicted class by head, and its probability. Heads that the kind does not have are kept, too."""

    names: dict[str, str]
    confidence: dict[str, float] = field(default_factory=dict)

    def __getitem__(self, head: str) -> str:
        return self.names[head]

    @property
    def attributes(self) -> tuple[str, ...]:
        """Binary attributes that the critter or person shows."""
        start = self.names["kind"] + "_"
        return tuple(h[len(start) :] for h, value in self.names.items() if h.startswith(start) and value == "present")

    def shows(self, wanted: dict[str, str]) -> bool:
        """Whether every wanted head has the wanted value."""
        return all(self.names[head] == value for head, value in wanted.items())


def reading_order(scene: Scene) -> tuple[Thing, Thing, str]:
    """The two things of a pair, left or upper one first, and the relation of the first ("left", "above")."""
    first, second = scene.things
    if scene.relation in ("right", "below"):
        first, second = second, first
    return first, second, "left" if scene.relation in ("left", "right") else "above"


def color_distance(a: str, b: str) -> float:
    """Euclidean distance of two named colours in RGB, each channel in [0, 1]."""
    return float(np.linalg.norm(np.subtract(v.ALL_COLORS[a], v.ALL_COLORS[b])))


def vanishes(color: str, background: str, floor: float = 0.3) -> bool:
    """Whether something of this colour cannot be told from the background."""
    if background in v.PLACES:
        return color in PLACE_CLASHES[background]
    return color_distance(color, background) < floor


def _object_targets(scene: Scene) -> dict[str, str]:
    thing = scene.things[0]
    values = {"shape": thing.shape, "color": thing.color, "texture": thing.texture, "size": thing.size}
    hidden: set[str] = set()
    if vanishes(thing.color, scene.background):
        hidden |= {"shape", "color", "texture", "size"}
    if thing.texture != "flat" and vanishes(thing.second_color, scene.background):
        hidden |= {"shape", "texture"}
    if thing.texture == "framed" and thing.shape in THIN_SHAPES:
        hidden |= {"shape", "color", "texture"}
    if scene.style in COARSE_STYLES:
        hidden |= {"texture", "shape"} if thing.size == "small" else {"texture"}
    return {head: value for head, value in values.items() if head not in hidden}


def targets(scene: Scene) -> dict[str, str]:
    """The true class of every head that this scene answers."""
    values = {"kind": scene.kind, "background": scene.background, "style": scene.style}
    plain = scene.background in v.ALL_COLORS
    if scene.style in ("negative", "posterized") and plain:
        del values["style"]  # another plain picture would look the same
    if scene.kind == "object":
        values |= _object_targets(scene)
    elif scene.kind == "pair":
        first, second, relation = reading_order(scene)
        values["relation"] = relation
        for head, thing in (("", first), ("second_", second)):
            if not vanishes(thing.color, scene.background):
                values |= {f"{head}shape": thing.shape, f"{head}color": thing.color}
    elif scene.kind == "sign":
        values |= {"color": scene.color, "letter_1": scene.text[0], "letter_2": (scene.text + "?")[1]}
        if len(scene.text) == 1:
            values["letter_2"] = NONE
    else:
        values["color"] = scene.color
        table = v.CRITTER_ATTRIBUTES if scene.kind == "critter" else v.PERSON_ATTRIBUTES
        hidden = {("critter", "white"): "beard", ("person", "red"): "scarf"}.get((scene.kind, scene.color))
        if scene.style not in COARSE_STYLES:
            values |= {
                f"{scene.kind}_{name}": "present" if name in scene.attributes else "absent"
                for name in table
                if name != hidden
            }
    if scene.style in COLORLESS_STYLES:
        values.pop("color", None)
        values.pop("second_color", None)
        if plain:
            del values["background"]
    return values


def class_indices(values: dict[str, str]) -> np.ndarray:
    """Class index of every head in the order of `HEADS`; -100 (ignored by the loss) where there is none."""
    return np.array([HEADS[h].index(values[h]) if h in values else -100 for h in HEADS], dtype=np.int64)
