"""Evaluate pictures of a subject: every metric beside its real-against-real oracle and the untouched base's floor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from lit_personalize.adapters.protocol import Adapter
from lit_personalize.backbones.base import Base
from lit_personalize.errors import UsageError
from lit_personalize.metrics import alignment
from lit_personalize.metrics.features import Clip, Dino
from lit_personalize.metrics.kernel_distance import SMALLEST_TO_HALVE, halves_mmd2, mmd2
from lit_personalize.sampling.sampler import SamplingOptions, generate

Measure = Callable[[Tensor, Tensor], float]
TEXT_MEASURES: dict[str, Measure] = {
    "CLIP-T": alignment.text_alignment,
    "CLIP-T (2.5 max(cos, 0))": alignment.clip_score,
    "CLIP-T normalised": alignment.normalised_text_alignment,
}
DISTANCES = {"KID": "kid", "MMD (CMMD's kernel)": "cmmd"}


@dataclass
class Figure:
    """One metric: its value, what real pictures score, and what the untouched base scores."""

    value: float
    oracle: float | None = None
    floor: float | None = None
    n: int = 0
    model: str = ""
    without_oracle: str = ""
    """Why there is no oracle, for example "n < 4"."""


@dataclass
class EvaluationReport:
    """All figures of one subject."""

    figures: dict[str, Figure] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


@dataclass
class Drawn:
    """Pictures to compare, uint8 `[N, H, W, 3]`; picture i was asked for by prompt i, or its words without the token.

    Args:
        generated: With the adapters.
        floor: The untouched base's, from the same seeds and the prompts without token.
        floor_again: The same from other seeds: what the base scores against itself. Unbiased estimates need sets
            that are independent of each other.
        classes: With the adapters, from the prompts without token: how far the class has moved.
        matched: Real pictures that show what was asked for.
    """

    generated: np.ndarray
    floor: np.ndarray | None = None
    floor_again: np.ndarray | None = None
    classes: np.ndarray | None = None
    matched: np.ndarray | None = None


def compare(
    drawn: Drawn, references: np.ndarray, prompts: Sequence[str], clip: Clip, dino: Dino | None = None
) -> dict[str, Figure]:
    """Figures of pictures that exist already.

    Oracles compare real pictures with real ones: each with the others (CLIP-I, DINO-I, nearest), one half with the
    other (KID, MMD), pictures that show the prompts with the prompts (CLIP-T).

    Args:
        references: uint8 `[R, H, W, 3]`: real pictures of the subject.
        prompts: Without token, one for each picture.
    """
    figures: dict[str, Figure] = {}
    for name, extractor in (("CLIP-I", clip), ("DINO-I", dino)):
        if extractor is None:
            continue
        own, real = extractor.images(drawn.generated), extractor.images(references)
        base = None if drawn.floor is None else extractor.images(drawn.floor)
        figures[name] = _figure(
            alignment.image_alignment, own, real, base, extractor.name, alignment.image_oracle(real), "n < 2"
        )
        if extractor is clip:
            figures["nearest training picture"] = _figure(
                alignment.nearest_similarity, own, real, base, clip.name, alignment.nearest_oracle(real), "n < 2"
            )
            figures |= _of_text(drawn, own, base, clip.texts(prompts), clip)
            figures |= _of_distance(drawn, own, base, real, clip)
    return figures


def _figure(
    measure: Measure, own: Tensor, other: Tensor, base: Tensor | None, model: str, oracle: float | None, reason: str
) -> Figure:
    """A figure and its floor; `reason` says why where the oracle is missing."""
    missing = oracle is None or math.isnan(oracle)
    floor = None if base is None else measure(base, other)
    return Figure(measure(own, other), None if missing else oracle, floor, len(own), model, reason if missing else "")


def _of_text(drawn: Drawn, own: Tensor, base: Tensor | None, words: Tensor, clip: Clip) -> dict[str, Figure]:
    matched = None if drawn.matched is None else clip.images(drawn.matched)
    return {
        label: _figure(
            measure, own, words, base, clip.name, None if matched is None else measure(matched, words), "no captions"
        )
        for label, measure in TEXT_MEASURES.items()
    }


def _of_distance(drawn: Drawn, own: Tensor, base: Tensor | None, real: Tensor, clip: Clip) -> dict[str, Figure]:
    """Squared distances of sets, where two pictures stand on each side."""
    figures: dict[str, Figure] = {}
    again = None if drawn.floor_again is None else clip.images(drawn.floor_again)
    moved = None if drawn.classes is None else clip.images(drawn.classes)
    for label, kernel in DISTANCES.items():

        def distance(x: Tensor, y: Tensor, kernel: str = kernel) -> float:
            return 1000 * mmd2(x, y, kernel)

        halves = halves_mmd2(real, kernel)
        oracle, reason = None if halves is None else 1000 * halves, f"n < {SMALLEST_TO_HALVE}"
        if min(len(own), len(real)) > 1:
            name = f"{label} to real pictures x 1000"
            figures[name] = _figure(distance, own, real, base, clip.name, oracle, reason)
        if moved is not None and again is not None and min(len(moved), len(again)) > 1:
            name = f"{label} of the class to the base x 1000"
            figures[name] = _figure(distance, moved, again, base, clip.name, oracle, reason)
    return figures


def evaluate(
    base: Base,
    adapters: Sequence[Adapter],
    references: np.ndarray,
    prompts: Sequence[str],
    clip_dir: str | Path,
    token: str | None = None,
    dino_dir: str | Path | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3),
    options: SamplingOptions | None = None,
    more: Callable[[np.ndarray, np.ndarray], dict[str, Figure]] | None = None,
    matched: np.ndarray | None = None,
) -> EvaluationReport:
    """Draw every prompt with every seed, with the adapters and without, and measure both.

    The untouched base draws twice, the second time from seeds that are not among `seeds`; prompts without the token
    are also drawn with the adapters.

    Args:
        prompts: With the token; metric models and the untouched base get them without it.
        more: Further figures of the two sets of pictures, ordered by prompt, then seed.
        matched: Real pictures that show what the prompts ask for, ordered by prompt, then seed, if there are any.

    Raises:
        DataError: A metric model's directory is missing.
        UsageError: Nothing to draw or to compare with.
    """
    if not prompts or not len(references) or not seeds:
        raise UsageError("evaluation needs at least one prompt, one reference picture and one seed")
    clip = Clip(clip_dir, device=base.device)
    dino = Dino(dino_dir, device=base.device) if dino_dir else None
    asked = [p for p in prompts for _ in seeds]
    plain = [alignment.without_token(p, token) for p in asked]
    drawn_seeds = list(seeds) * len(prompts)
    others = [seed + max(seeds) - min(seeds) + 1 for seed in drawn_seeds]
    generated = generate(base, asked, drawn_seeds, adapters, options)
    floor = generate(base, plain, drawn_seeds, None, options)
    again = generate(base, plain, others, None, options)
    classes = generated if plain == asked else generate(base, plain, drawn_seeds, adapters, options)
    figures = more(generated, floor) if more else {}
    figures.update(compare(Drawn(generated, floor, again, classes, matched), references, plain, clip, dino))
    return EvaluationReport(figures, list(prompts), list(seeds))
