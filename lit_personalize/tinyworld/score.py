"""How well pictures show what their scenes say, read by the reader and, for colours, from the pixels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from lit_personalize.tinyworld import vocabulary as v
from lit_personalize.tinyworld.attributes import NONE, targets
from lit_personalize.tinyworld.reader import Reader
from lit_personalize.tinyworld.scene import Scene


def balanced_accuracy(pairs: Iterable[tuple[str, str]]) -> float:
    """Mean over true classes of the share read right; pairs are (true, read). "unclear" is never right."""
    right: dict[str, list[bool]] = defaultdict(list)
    for true, read in pairs:
        right[true].append(true == read)
    return float(np.mean([np.mean(hits) for hits in right.values()])) if right else float("nan")


def nearest_color(rgb: np.ndarray) -> str:
    """The named colour at the smallest RGB distance from `rgb` in [0, 1]."""
    names = list(v.ALL_COLORS)
    table = np.array([v.ALL_COLORS[name] for name in names])
    return names[int(np.linalg.norm(table - rgb, axis=1).argmin())]


def colors_from_pixels(pixels: np.ndarray) -> tuple[str, str]:
    """Background and foreground of a plain picture `[H, W, 3]`: medians of the border, and of what differs from it."""
    unit = pixels.astype(np.float64) / 255
    edge = max(1, len(unit) // 16)
    border = np.concatenate([unit[:edge].reshape(-1, 3), unit[-edge:].reshape(-1, 3)])
    ground = np.median(border, axis=0)
    apart = unit.reshape(-1, 3)[np.linalg.norm(unit.reshape(-1, 3) - ground, axis=1) > 0.25]
    subject = np.median(apart, axis=0) if len(apart) else ground
    return nearest_color(ground), nearest_color(subject)


# name on the card -> (kinds of scenes, heads of the reader)
GROUPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "shape": (("object",), ("shape",)),
    "shape, flat-filled": (("object",), ("shape",)),
    "object colour": (("object",), ("color",)),
    "texture": (("object",), ("texture",)),
    "background": (("object", "critter", "person", "pair", "sign"), ("background",)),
    "critter attributes": (("critter",), tuple(f"critter_{a}" for a in v.CRITTER_ATTRIBUTES)),
    "critter colour": (("critter",), ("color",)),
    "person attributes": (("person",), tuple(f"person_{a}" for a in v.PERSON_ATTRIBUTES)),
    "pair relation": (("pair",), ("relation",)),
    "pair shapes": (("pair",), ("shape", "second_shape")),
    "sign letters": (("sign",), ("letter_1", "letter_2")),
}


def score_pictures(pixels: np.ndarray, scenes: list[Scene], reader: Reader) -> dict[str, float]:
    """Balanced accuracy by attribute, in [0, 1]; attributes with several heads are averaged over them.

    A picture of another kind than asked (no critter where one was asked) counts as wrong for all of its attributes.
    """
    readings, truths = reader.read(pixels), [targets(scene) for scene in scenes]
    scores = {}
    for name, (kinds, heads) in GROUPS.items():
        values = []
        for head in heads:
            pairs = []
            for scene, truth, reading in zip(scenes, truths, readings, strict=True):
                if scene.kind not in kinds or truth.get(head, NONE) == NONE:
                    continue
                if name.endswith("flat-filled") and truth["texture"] != "flat":
                    continue
                is_kind = head == "background" or reading["kind"] == scene.kind
                pairs.append((truth[head], reading[head] if is_kind else "unclear"))
            if pairs:
                values.append(balanced_accuracy(pairs))
        if values:
            scores[name] = float(np.mean(values))
    plain = [
        (scene, colors_from_pixels(picture))
        for scene, picture in zip(scenes, pixels, strict=True)
        if scene.kind == "object" and scene.background in v.COLORS and scene.things[0].texture == "flat"
    ]
    if plain:
        scores["background, from pixels"] = balanced_accuracy((s.background, found[0]) for s, found in plain)
        scores["object colour, from pixels"] = balanced_accuracy((s.things[0].color, found[1]) for s, found in plain)
    return scores
