"""What a tinyworld picture shows, as plain data, and how scenes are drawn at random.

A `Scene` is everything the renderer and the caption grammar need; no image is involved here.
The base is trained on `sample_scene(rng, "base")`. `split_of` decides from the scene alone which
combinations are kept away from the base: its test captions are combinations it never saw.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from lit_personalize.tinyworld import vocabulary as v

Kind = Literal["object", "pair", "critter", "person", "sign"]
Population = Literal["base", "all"]  # "all" includes held-out attributes

# Share of each kind of scene in the training set of the base.
KIND_SHARES: dict[Kind, float] = {"object": 0.52, "pair": 0.08, "critter": 0.25, "person": 0.08, "sign": 0.07}
HELD_OUT_SHARE = 0.1  # of (shape, colour, background) and critter combinations


@dataclass(frozen=True)
class Thing:
    """One drawn shape. `x`, `y` and `radius` are in units of the picture's side."""

    shape: str
    color: str
    texture: str = "flat"
    second_color: str = "white"  # the other colour of a texture
    size: str = "medium"
    x: float = 0.5
    y: float = 0.5
    radius: float = 0.27
    angle: float = 0.0


@dataclass(frozen=True)
class Scene:
    """One picture. `attributes` are the binary ones of critters and persons; `body` their shape."""

    kind: Kind
    things: tuple[Thing, ...] = ()
    background: str = "white"  # a colour name or a place name
    style: str = "photo"
    color: str = ""  # of a critter, of a person's clothes, of a sign
    attributes: tuple[str, ...] = ()
    body: tuple[float, ...] = ()
    relation: str = ""
    text: str = ""
    seed: int = 0  # of the small variations: grain, place details
    extra: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> Scene:
        """The scene whose `to_dict` went through JSON, which knows no tuples."""
        lists = {name: tuple(value) for name, value in told.items() if isinstance(value, list)}
        return cls(**{**told, **lists, "things": tuple(Thing(**thing) for thing in told["things"])})


def split_of(scene: Scene) -> Literal["train", "test"]:
    """Say whether the base may see this scene's combination of attributes.

    Deterministic in the combination itself (CRC-32, independent of Python's hash seed).
    Pairs, persons and signs are held out by their main combination, too.
    """
    if scene.kind in ("object", "pair"):
        keys = [f"{t.shape}/{t.color}/{scene.background}" for t in scene.things]
    elif scene.kind == "critter":
        keys = [f"critter/{scene.color}/{','.join(sorted(scene.attributes))}"]
    elif scene.kind == "person":
        keys = [f"person/{scene.color}/{','.join(sorted(scene.attributes))}/{scene.background}"]
    else:
        keys = [f"sign/{scene.color}/{scene.text}/{scene.background}"]
    held = any(zlib.crc32(key.encode()) % 1000 < 1000 * HELD_OUT_SHARE for key in keys)
    return "test" if held else "train"


def _choose(rng: np.random.Generator, items: Iterable[str]) -> str:
    items = tuple(items)
    return items[int(rng.integers(len(items)))]


# Colours that would vanish in a place.
PLACE_CLASHES: dict[str, tuple[str, ...]] = {
    "beach": ("yellow", "cyan"), "forest": ("green",), "snow": ("white", "gray"), "night": ("black", "blue"),
    "desert": ("orange", "brown"), "city": ("gray",), "meadow": ("green", "cyan"), "sea": ("blue", "cyan"),
}  # fmt: skip


def contrasting(background: str, floor: float = 0.45) -> list[str]:
    """Base colours that stand out from a background: a place, or a colour at RGB distance `floor`."""
    if background in v.PLACES:
        return [name for name in v.COLORS if name not in PLACE_CLASHES[background]]
    here = np.array(v.ALL_COLORS[background])
    return [name for name, rgb in v.COLORS.items() if float(np.linalg.norm(np.array(rgb) - here)) >= floor]


# Also a small shape is wide enough (12 of 64 pixels to a side of its centre) for latents of a quarter of the side.
_SIZE_RADIUS = {"small": (0.19, 0.22), "medium": (0.26, 0.31), "large": (0.36, 0.40)}


def sample_thing(
    rng: np.random.Generator,
    population: Population = "base",
    *,
    shape: str | None = None,
    color: str | None = None,
    texture: str | None = None,
    size: str | None = None,
    avoid: str | None = None,
) -> Thing:
    """Draw one shape; `avoid` is a background colour that it must stand out from."""
    shapes = v.SHAPES if population == "base" else v.ALL_SHAPES
    textures = v.TEXTURES if population == "base" else v.ALL_TEXTURES
    shape = shape or _choose(rng, shapes)
    pool = contrasting(avoid) if avoid else list(v.COLORS)
    if color is None:
        if population == "all" and rng.random() < 0.25:
            pool = list(v.HELD_OUT_COLORS)
        color = _choose(rng, pool)
    if size is None:
        size = _choose(rng, ("small", "medium", "medium", "medium", "large"))
    if texture is None:
        texture = "flat" if size == "small" or rng.random() < 0.55 else _choose(rng, textures[1:])
    low, high = _SIZE_RADIUS[size]
    radius = float(rng.uniform(low, high))
    slack = max(0.0, 0.47 - radius) * 0.55
    second = "white"
    if texture != "flat":  # stands out from the shape's own colour and from the background
        seconds = [c for c in ("white", "black", "yellow") if c in contrasting(color)]
        second = _choose(rng, [c for c in seconds if c in pool] or seconds)
    return Thing(
        shape=shape,
        color=color,
        texture=texture,
        second_color=second,
        size=size,
        x=0.5 + float(rng.uniform(-slack, slack)),
        y=0.5 + float(rng.uniform(-slack, slack)),
        radius=radius,
        angle=float(rng.uniform(-0.12, 0.12)),
    )


def sample_background(rng: np.random.Generator, colors_only: bool = False) -> str:
    if colors_only or rng.random() < 0.7:
        return _choose(rng, v.COLORS)
    return _choose(rng, v.PLACES)


def sample_style(rng: np.random.Generator, population: Population) -> str:
    if rng.random() < 0.88:
        return "photo"
    return _choose(rng, (v.STYLES if population == "base" else v.ALL_STYLES)[1:])


def sample_body(rng: np.random.Generator) -> tuple[float, ...]:
    return tuple(round(float(x), 3) for x in rng.uniform(0, 1, len(v.CRITTER_BODY)))


def _sample_pair(rng: np.random.Generator, population: Population, background: str) -> Scene:
    relation = _choose(rng, v.RELATIONS)
    first = sample_thing(rng, population, size="small", avoid=background)
    second = sample_thing(rng, population, size="small", avoid=background)
    offset = float(rng.uniform(0.22, 0.25))
    jitter = rng.uniform(-0.05, 0.05, 2)
    across = relation in ("left", "right")
    sign = -1.0 if relation in ("left", "above") else 1.0
    places = []
    for thing, side, wobble in ((first, sign, jitter[0]), (second, -sign, jitter[1])):
        x, y = (0.5 + side * offset, 0.5 + wobble) if across else (0.5 + wobble, 0.5 + side * offset)
        places.append(Thing(**{**asdict(thing), "x": float(x), "y": float(y), "radius": 0.18}))
    return Scene("pair", things=tuple(places), background=background, relation=relation)


def sample_scene(rng: np.random.Generator, population: Population = "base", kind: Kind | None = None) -> Scene:
    """Draw one scene. `population="base"` never contains a held-out attribute."""
    if kind is None:
        kinds = tuple(KIND_SHARES)
        kind = kinds[int(rng.choice(len(kinds), p=np.array(list(KIND_SHARES.values()))))]
    seed = int(rng.integers(2**31))
    style = sample_style(rng, population)
    background = sample_background(rng)
    if kind == "object":
        thing = sample_thing(rng, population, avoid=background)
        return Scene("object", things=(thing,), background=background, style=style, seed=seed)
    if kind == "pair":
        pair = _sample_pair(rng, population, sample_background(rng, colors_only=True))
        return Scene(**{**pair.__dict__, "seed": seed})
    pool = contrasting(background)
    if kind == "critter":
        attributes = tuple(a for a in v.CRITTER_ATTRIBUTES if rng.random() < 0.35)
        color = _choose(rng, [c for c in pool if c not in ("black",)])
        return Scene(kind, background=background, style=style, color=color, attributes=attributes,
                     body=sample_body(rng), seed=seed)  # fmt: skip
    if kind == "person":
        attributes = tuple(a for a in v.PERSON_ATTRIBUTES if rng.random() < 0.35)
        background = _choose(rng, v.PLACES) if rng.random() < 0.6 else background
        return Scene(kind, background=background, style=style, color=_choose(rng, v.COLORS), attributes=attributes,
                     body=sample_body(rng), seed=seed)  # fmt: skip
    text = "".join(_choose(rng, v.GLYPHS) for _ in range(int(rng.integers(1, 3))))
    return Scene(kind, background=background, style="photo", color=_choose(rng, pool), text=text, seed=seed)


def sample_split(
    rng: np.random.Generator, split: Literal["train", "test"], population: Population = "base", kind: Kind | None = None
) -> Scene:
    """Draw scenes until one belongs to `split`."""
    while True:
        scene = sample_scene(rng, population, kind)
        if split_of(scene) == split:
            return scene


def is_held_out(scene: Scene) -> bool:
    """Whether the scene contains an attribute that no training picture of the base has."""
    return scene.style in v.HELD_OUT_STYLES or any(
        t.shape in v.HELD_OUT_SHAPES or t.color in v.HELD_OUT_COLORS or t.texture in v.HELD_OUT_TEXTURES
        for t in scene.things
    )
