"""The committed base draws plain captions that it never saw, and the committed reader reads them."""

from __future__ import annotations

from lit_personalize.backbones.loading import load_base, tinyworld_directory
from lit_personalize.sampling.sampler import SamplingOptions, generate
from lit_personalize.tinyworld.captions import caption
from lit_personalize.tinyworld.reader import Reader
from lit_personalize.tinyworld.scene import Scene, Thing, split_of

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
GROUNDS = ("white", "yellow", "orange", "blue", "pink", "black", "brown", "gray")


def _unseen(count: int) -> list[Scene]:
    """Plain objects on plain backgrounds, combinations that were kept from training, shapes in turn."""
    scenes = [
        Scene("object", (Thing(shape, color),), background=ground)
        for color in COLORS
        for ground in GROUNDS
        for shape in SHAPES
        if color != ground
    ]
    held_out = [scene for scene in scenes if split_of(scene) == "test"]
    chosen = [[s for s in held_out if s.things[0].shape == shape][: count // len(SHAPES)] for shape in SHAPES]
    return [scene for group in chosen for scene in group]


def test_plain_captions_are_drawn_as_asked() -> None:
    scenes = _unseen(16)
    base = load_base("tinyworld")
    options = SamplingOptions(steps=20, guidance=3.0, batch_size=16)
    drawn = generate(base, [caption(scene) for scene in scenes], list(range(len(scenes))), options=options)
    readings = Reader.load(tinyworld_directory().parent / "reader").read(drawn)
    right = {
        head: sum(r[head] == asked for r, asked in zip(readings, wanted, strict=True))
        for head, wanted in {
            "shape": [s.things[0].shape for s in scenes],
            "color": [s.things[0].color for s in scenes],
            "background": [s.background for s in scenes],
        }.items()
    }
    # Well below the card's shares, far above chance (1 in 12 each).
    assert right["shape"] >= 10 and right["color"] >= 13 and right["background"] >= 14, right
