"""What is looked for, and how: everything that decides the outcome of a retrieval, and nothing that does not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from lit_datamodules.errors import DataOptionError

# Columns by which published data sets (LAION, DataComp, COYO) name the same thing.
ALIASES: dict[str, tuple[str, ...]] = {
    "width": ("width", "WIDTH"),
    "height": ("height", "HEIGHT"),
    "punsafe": ("punsafe", "NSFW", "nsfw"),
    "watermark": ("pwatermark", "watermark_score", "watermark"),
    "aesthetic": ("aesthetic", "AESTHETIC_SCORE", "aesthetic_score_laion_v2", "aesthetic_score"),
    "licence": ("LICENSE", "license", "licence"),
    "language": ("LANGUAGE", "language", "lang"),
}


class CaptionEncoder(Protocol):
    """Turns captions into unit vectors; its methods may run in different threads."""

    @property
    def fingerprint(self) -> str:
        """Of the weights and of how captions are embedded: similarities of two encoders do not compare."""

    def tokenize(self, captions: Sequence[str]) -> Any:
        """What `embed` takes."""

    def embed(self, tokens: Any) -> np.ndarray:
        """fp32 `[N, d]`, each row of length 1."""


@dataclass(frozen=True)
class Query:
    """One concept: a sentence, or pictures that the caller has embedded.

    Args:
        name: Names the concept in the result; the sentence, unless another is given.
        text: Compared with captions; empty for pictures.
        image: Path of the picture or of a folder of them, for the record.
        sha256: Of their files: other pictures under the same path are another query.
    """

    name: str
    text: str = ""
    image: str = ""
    sha256: str = ""

    def __post_init__(self) -> None:
        if bool(self.text) == bool(self.image):
            raise DataOptionError(f"query {self.name!r} has a text or an image, one of both")


@dataclass(frozen=True)
class Filters:
    """What a sample must have; None asks nothing. Fields are read from its `json`, under the usual names.

    A sample that lacks a field that is asked for is dropped, and counted apart.

    Args:
        min_side: Pixels of the shorter side.
        max_punsafe: Probability of unsafe content.
        max_watermark: Probability of a watermark.
        min_aesthetic: Aesthetic score.
        licences: Accepted values of the licence field, compared without case.
        languages: Accepted values of the language field, compared without case.
    """

    min_side: int | None = None
    max_punsafe: float | None = None
    max_watermark: float | None = None
    min_aesthetic: float | None = None
    licences: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()

    @property
    def asks(self) -> bool:
        """Whether anything is asked."""
        return self != Filters()

    def reason(self, meta: Mapping[str, Any]) -> str:
        """Why a sample is dropped, such as "punsafe above 0.5" or "no punsafe field"; "" if it stays."""
        if self.min_side is not None:
            sides = [_number(meta, name) for name in ("width", "height")]
            known = [side for side in sides if side is not None]
            if len(known) == 2 and min(known) < self.min_side:  # unknown sizes are looked up in the picture later
                return f"side below {self.min_side}"
        limits = (("punsafe", self.max_punsafe, 1), ("watermark", self.max_watermark, 1),
                  ("aesthetic", self.min_aesthetic, -1))  # fmt: skip
        for name, limit, sign in limits:
            if limit is None:
                continue
            value = _number(meta, name)
            if value is None:
                return f"no {name} field"
            if sign * (value - limit) > 0:
                return f"{name} {'above' if sign > 0 else 'below'} {limit:g}"
        for name, accepted in (("licence", self.licences), ("language", self.languages)):
            if not accepted:
                continue
            said = _find(meta, name)
            if said is None:
                return f"no {name} field"
            if str(said).strip().lower() not in {a.lower() for a in accepted}:
                return f"{name} not accepted"
        return ""


def _find(meta: Mapping[str, Any], name: str) -> Any:
    return next((meta[alias] for alias in ALIASES[name] if meta.get(alias) is not None), None)


UNSAFE_WORDS = {"unlikely": 0.0, "unsure": 0.5, "nsfw": 1.0}
"""LAION-400M's column NSFW in words."""


def _number(meta: Mapping[str, Any], name: str) -> float | None:
    value = _find(meta, name)
    if isinstance(value, str) and name == "punsafe":
        value = UNSAFE_WORDS.get(value.strip().lower(), value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if number == number else None


@dataclass(frozen=True)
class Plan:
    """All that decides which candidates a shard gives.

    Args:
        encoder: Fingerprint of the caption encoder.
        keep: Candidates of a shard per query, the most similar ones.
        batch_size: Captions embedded at once; sums of floating-point numbers depend on it.
    """

    queries: tuple[Query, ...]
    encoder: str
    filters: Filters = field(default_factory=Filters)
    keep: int = 800
    batch_size: int = 256

    def __post_init__(self) -> None:
        names = [query.name for query in self.queries]
        if not names:
            raise DataOptionError("nothing to look for: give a query")
        if twice := {name for name in names if names.count(name) > 1}:
            raise DataOptionError(f"two queries are called {sorted(twice)[0]!r}; name one otherwise")
        for name, least in (("keep", self.keep), ("batch_size", self.batch_size)):
            if least < 1:
                raise DataOptionError(f"{name} must be at least 1, not {least}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def id(self) -> str:
        """Sixteen hex digits; parts of one plan belong together."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]
