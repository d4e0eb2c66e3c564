"""Cosine metrics on feature matrices: subject fidelity, prompt alignment, memorisation.

Legend: `G` generated, `R` reference pictures, `d` features.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torchmetrics.functional import pairwise_cosine_similarity


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """All pairwise cosines `[len(a), len(b)]` in fp64."""
    return pairwise_cosine_similarity(a.double(), b.double())


def image_alignment(generated: Tensor, references: Tensor) -> float:
    """Mean cosine over all pairs `[G, d]` x `[R, d]`: CLIP-I or DINO-I (Ruiz et al., 2022, sec. 4.1)."""
    return float(cosines(generated, references).mean())


def image_oracle(references: Tensor) -> float:
    """Mean cosine of each real picture with the others: what a perfect copy of the subject's variety scores."""
    if len(references) < 2:
        return float("nan")
    matrix = cosines(references, references)
    n = len(references)
    return float((matrix.sum() - matrix.diagonal().sum()) / (n * (n - 1)))


def text_alignment(generated: Tensor, captions: Tensor) -> float:
    """Mean cosine of picture i with caption i, both `[G, d]`: CLIP-T (Ruiz et al., 2022)."""
    return float(cosines(generated, captions).diagonal().mean())


def clip_score(generated: Tensor, captions: Tensor) -> float:
    """Mean of 2.5 · max(cos, 0) (Hessel et al., 2021, eq. 1), the scale of CustomConcept101's tables."""
    return float((2.5 * cosines(generated, captions).diagonal().clamp(min=0)).mean())


def normalised_text_alignment(generated: Tensor, captions: Tensor) -> float:
    """CLIP-T between its value for mismatched captions (0) and a picture's own best caption (1).

    Mismatched: the mean over all other captions of the set. Matched: the largest over the set.
    """
    matrix = cosines(generated, captions)
    n = len(matrix)
    own = matrix.diagonal()
    others = (matrix.sum(1) - own) / max(1, n - 1)
    best = matrix.max(1).values
    return float(((own - others) / (best - others).clamp(min=1e-9)).clamp(-1, 1).mean())


def nearest_similarity(pictures: Tensor, training: Tensor) -> float:
    """Mean over pictures of the cosine with the nearest training picture: high values mean memorisation."""
    return float(cosines(pictures, training).max(1).values.mean())


def nearest_oracle(references: Tensor) -> float:
    """Mean over real pictures of the cosine with the nearest other one: what an unseen real picture scores."""
    if len(references) < 2:
        return float("nan")
    matrix = cosines(references, references)
    return float(matrix.fill_diagonal_(-1.0).max(1).values.mean())


def without_token(prompt: str, token: str | None) -> str:
    """The prompt as a metric model reads it: "a <new1> cat" becomes "a cat"."""
    if not token:
        return prompt
    return " ".join(re.sub(rf"{re.escape(token)}(_\d+)?", " ", prompt).split())


def interval(values: Tensor, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a mean, from a seeded resampling."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (draws, len(values)), generator=generator)
    means = values.double()[picks].mean(1)
    return float(means.quantile(0.025)), float(means.quantile(0.975))
