"""What stands on a data module's sheet: the pictures of every concept, their training views, the regularization set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from lit_datamodules.concept_folder import Concept, Sample
from lit_datamodules.errors import DataError
from lit_datamodules.order import INSTANCE, Order
from lit_datamodules.sheet import Section, Tile
from lit_datamodules.training_view import Geometry, Shot, decide, mask_of, pixels_of, still


def tile_of(sample: Sample, shot: Shot, geometry: Geometry, note: str) -> Tile:
    """One view with the caption that goes with it; grey where a streamed picture turns out to be damaged."""
    try:
        pixels = pixels_of(sample, shot)
    except DataError:
        pixels, note = np.zeros((3, *shot.view.shape), np.float32), f"{note}: damaged"
    return Tile(pixels, shot.caption, note, mask_of(sample, shot, geometry.downscale))


def file_name(sample: Sample) -> str:
    return Path(sample.name).name


def picture_section(title: str, explanation: str, samples: Sequence[Sample], geometry: Geometry, most: int) -> Section:
    """Pictures as they are without chance."""
    left_out = f"; {len(samples) - most} more are not shown" if len(samples) > most else ""
    tiles = [tile_of(s, still(s, geometry), geometry, file_name(s)) for s in samples[:most]]
    return Section(title, explanation + left_out, tiles)


def training_section(
    title: str, concept: int, samples: Sequence[Sample], order: Order, geometry: Geometry, most: int
) -> Section:
    """The first views of a concept that training will see."""
    tiles: list[Tile] = []
    for step in range(most * max(1, len(order.buckets) * len(order.buckets[0].pools))):
        for slot in order.batch(step):
            sample = samples[slot.sample]
            if sample.role == 0 and sample.concept == concept and len(tiles) < most:
                shot = decide(sample, slot, geometry)
                marks = " mirrored" if shot.view.flip else ""
                tiles.append(tile_of(sample, shot, geometry, f"step {step}: {file_name(sample)}{marks}"))
        if len(tiles) == most:
            break
    return Section(title, "The first training views. Red cells do not count in the loss.", tiles)


def sections(
    concepts: Sequence[Concept],
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    order: Order,
    geometry: Geometry,
    most: int = 12,
) -> Iterable[Section]:
    """Sections of the sheet: one or two per concept, one per regularization set, one of held-out pictures."""
    for index, concept in enumerate(concepts):
        mine = [s for s in samples if s.role == 0 and s.concept == index]
        shapes = Counter(shape for sample in mine for shape in geometry.shapes(sample))
        many = len(shapes) > 1
        sizes = ", ".join(f"{w} x {h}" + f" ({n})" * many for (h, w), n in sorted(shapes.items()))
        explanation = f"{len(mine)} pictures of {concept.path}; pixels: {sizes}; crop: {geometry.crop}"
        yield picture_section(f"Concept {index}: {concept.title}", explanation, mine, geometry, most)
        mirrored = any(s.flip for s in mine)
        if many or geometry.moves(INSTANCE) or mirrored or any(len(s.captions) > 1 for s in mine):
            yield training_section(f"Concept {index} in training", index, samples, order, geometry, most)
    for index in sorted({s.concept for s in samples if s.role != 0}):
        mine = [s for s in samples if s.role != 0 and s.concept == index]
        explanation = f"{len(mine)} pictures; each batch has {order.per_batch} of the regularization sets"
        yield picture_section(f"Regularization set {index}", explanation, mine, geometry, most)
    if held_out:
        yield picture_section("Held out", "For validation, never trained on", held_out, geometry, most)
