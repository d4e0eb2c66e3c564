"""What a plan needs to know of the data: how many pictures there are, and what a batch of them is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_personalize.errors import DataError
from lit_personalize.objectives.denoising import Denoising
from lit_personalize.planning_memory import View
from lit_personalize.preflight import trained_tokens


@dataclass
class Pictures:
    """Counts are None where the pictures are not here."""

    view: View
    concepts: int | None = None
    regularization: int | None = None
    places: int | None = None
    """Instances of an epoch: pictures times their repeats."""
    missing: str = ""
    """Why pictures are not counted."""
    damaged: bool = False
    """Whether what is missing is there, so that `fit` would refuse it; a plan may be made before there are pictures."""


def count_pictures(data: Any, objective: Denoising) -> Pictures:
    """Count the pictures of a data module as it counts them itself; sets that are still to be drawn count, too.

    Raises:
        UsageError: What the module refuses.
    """
    base = objective.built
    if hasattr(data, "suit"):
        data.suit(base.resolution, base.downscale)
    side = getattr(data, "resolution", None) or base.resolution
    roles = getattr(data, "roles_of_batch", None) or {0: getattr(data, "batch_size", 1), 1: 0}
    view = View(roles[0], roles[1], (side, side), _captions(objective), getattr(data, "drawn_per_batch", roles[0]))
    found = Pictures(view)
    if not hasattr(data, "samples"):
        found.missing = f"{type(data).__name__} does not say how many pictures it has"
        return found
    later = [r for r in data.regularization if r.generate]
    kept, data.cache_latents = (data.regularization, data.cache_latents), False  # nothing is encoded here
    data.regularization = [r for r in data.regularization if not r.generate]
    try:
        data.setup("fit")
    except Exception as error:
        if getattr(error, "exit_code", None) != DataError.exit_code:
            raise
        found.missing = str(error)
        found.damaged = all(Path(concept.path).exists() for concept in data.concepts)
        return found
    else:
        buckets = data.order.buckets
    finally:
        data.regularization, data.cache_latents = kept
    view.shape = max((bucket.shape for bucket in buckets), key=lambda shape: shape[0] * shape[1])
    view.captions = [s.captions[0] for s in data.samples if s.role == 0] or view.captions
    found.concepts = sum(s.role == 0 for s in data.samples)
    found.regularization = sum(s.role == 1 for s in data.samples) + sum(r.generate for r in later)
    found.places = sum(bucket.places for bucket in buckets)
    return found


def without_data(objective: Denoising, options: Any) -> Pictures:
    """What can be said of a data module that refused its options, from these alone."""

    def of(name: str, default: Any) -> Any:
        return options.get(name, None) or default

    base, batch = objective.built, int(of("batch_size", 1))
    sides = of("resolution", base.resolution)
    side = max(sides) if isinstance(sides, list) else int(sides)
    priors = batch if of("regularization", None) else 0
    return Pictures(View(batch, priors, (side, side), _captions(objective), batch + priors), missing="no pictures")


def _captions(objective: Denoising) -> list[str]:
    return [f"a photo of a {' '.join(trained_tokens(objective))}".strip()]
