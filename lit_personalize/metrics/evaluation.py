"""Evaluate pictures of a subject: every metric beside its real-against-real oracle and the untouched base's floor."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from lit_personalize.adapters.protocol import Adapter
from lit_personalize.backbones.base import Base
from lit_personalize.errors import UsageError
from lit_personalize.metrics import alignment
from lit_personalize.metrics.features import Clip, Dino
from lit_personalize.metrics.kernel_distance import mmd2
from lit_personalize.sampling.sampler import SamplingOptions, generate


@dataclass
class Figure:
    """One metric: its value, what real pictures score, and what the untouched base scores."""

    value: float
    oracle: float | None = None
    floor: float | None = None
    n: int = 0
    model: str = ""


@dataclass
class EvaluationReport:
    """All figures of one subject."""

    figures: dict[str, Figure] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def compare(
    generated: np.ndarray, floor: np.ndarray | None, references: np.ndarray, prompts: Sequence[str], clip: Clip,
    dino: Dino | None = None,
) -> dict[str, Figure]:  # fmt: skip
    """Figures of pictures that exist already.

    Args:
        generated: uint8 `[G, H, W, 3]`; picture i was asked for by `prompts[i]` (without token).
        floor: The untouched base's pictures for the same prompts, or None.
        references: uint8 `[R, H, W, 3]`: real pictures of the subject.
    """
    figures: dict[str, Figure] = {}
    for name, extractor in (("CLIP-I", clip), ("DINO-I", dino)):
        if extractor is None:
            continue
        own, real = extractor.images(generated), extractor.images(references)
        base = extractor.images(floor) if floor is not None else None
        figures[name] = Figure(
            alignment.image_alignment(own, real), alignment.image_oracle(real),
            alignment.image_alignment(base, real) if base is not None else None, len(own), extractor.name,
        )  # fmt: skip
        if name == "CLIP-I":
            figures["nearest training picture"] = Figure(
                alignment.nearest_similarity(own, real), None,
                alignment.nearest_similarity(base, real) if base is not None else None, len(own), extractor.name,
            )  # fmt: skip
            words = clip.texts(prompts)
            for label, measure in (
                ("CLIP-T", alignment.text_alignment),
                ("CLIP-T (2.5 max(cos, 0))", alignment.clip_score),
                ("CLIP-T normalised", alignment.normalised_text_alignment),
            ):
                low = measure(base, words) if base is not None else None
                figures[label] = Figure(measure(own, words), None, low, len(own), clip.name)
            if base is not None and len(own) > 1:
                drift = 1000 * mmd2(own, base, "kid")
                figures["KID to the base x 1000"] = Figure(drift, None, 0.0, len(own), clip.name)
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
) -> EvaluationReport:
    """Draw every prompt with every seed, with the adapters and without, and measure both.

    Args:
        prompts: With the token; metric models and the untouched base get them without it.
        more: Further figures of the two sets of pictures, ordered by prompt, then seed.

    Raises:
        DataError: A metric model's directory is missing.
        UsageError: Nothing to draw or to compare with.
    """
    if not prompts or not len(references):
        raise UsageError("evaluation needs at least one prompt and one reference picture")
    clip = Clip(clip_dir)
    dino = Dino(dino_dir) if dino_dir else None
    asked = [p for p in prompts for _ in seeds]
    plain = [alignment.without_token(p, token) for p in asked]
    drawn_seeds = list(seeds) * len(prompts)
    generated = generate(base, asked, drawn_seeds, adapters, options)
    floor = generate(base, plain, drawn_seeds, None, options)
    figures = more(generated, floor) if more else {}
    figures.update(compare(generated, floor, references, plain, clip, dino))
    return EvaluationReport(figures, list(prompts), list(seeds))
