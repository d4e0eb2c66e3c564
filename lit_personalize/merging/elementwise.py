"""Merges that decide element by element: magnitude pruning, TIES, DARE, MagMax.

The papers define them on task vectors, the change of every weight: here ΔW `[out, in]` of one layer, formed, merged
and factored again before the next one is. PEFT also offers them on the factors A and B by themselves, where an element
has no meaning of its own (B A = (B R)(R⁻¹ A) for any invertible R): the result depends on how training happened to
turn the factors, but keeps the rank, and it is there for comparison with files made by PEFT.

Strengths are multiplied in first: what is merged is what the adapters do at their strengths. PEFT multiplies after
signs are elected; for equal strengths both are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, magnitude_based_pruning
from torch import Tensor

from lit_personalize import randomness

Sign = Literal["total", "frequency"]


@dataclass(frozen=True)
class Draws:
    """Where DARE's draws come from: a function of seed, layer, factor and the adapter's place in the list."""

    seed: int
    layer: str

    def keep(self, shape: torch.Size, density: float, adapter: int) -> Tensor:
        """Bernoulli(density) `shape`, bool."""
        numbers = randomness.generator(self.seed, f"dare:{self.layer}", 0, adapter).random(tuple(shape))
        return torch.from_numpy(numbers < density)


def trim(task: Tensor, density: float) -> Tensor:
    """The `density` of elements that are largest in absolute value; the others are zero.

    Of this tensor alone, as in PEFT. The TIES paper trims over the whole model at once.
    """
    return task if density == 1 else magnitude_based_pruning(task, density)


def magnitude(tasks: Sequence[Tensor], density: float) -> Tensor:
    """The sum of the trimmed changes."""
    return torch.stack([trim(task, density) for task in tasks]).sum(0)


def ties(tasks: Sequence[Tensor], density: float, sign: Sign = "total") -> Tensor:
    """TIES-Merging (Yadav et al., 2023, arXiv 2306.01708, algorithm 1): trim, elect a sign, merge what agrees.

    An element is the *mean* over the adapters that have the elected sign, so what only one adapter changes keeps its
    size, and what two change alike is not doubled.

    Args:
        density: Share of elements to keep per layer; the paper's k, 0.2.
        sign: Elected by the "total" mass of each sign (the paper), or by "frequency", the count of adapters.
    """
    return _elect_and_mean([trim(task, density) for task in tasks], sign)


def dare(tasks: Sequence[Tensor], numbers: Sequence[int], density: float, draws: Draws) -> list[Tensor]:
    """DARE (Yu et al., 2023, arXiv 2311.03099): drop elements at random, rescale the rest by 1 / density.

    Each result has its change as expectation. Sum the results ("linear"), or elect signs by `dare_ties`.

    Args:
        numbers: Place of each adapter in the whole list, which its draws belong to.
        density: Share to keep, 1 - p of the paper.
    """
    return [
        torch.where(draws.keep(task.shape, density, n), task / density, torch.zeros((), dtype=task.dtype))
        for task, n in zip(tasks, numbers, strict=True)
    ]


def dare_ties(tasks: Sequence[Tensor], numbers: Sequence[int], density: float, draws: Draws, sign: Sign) -> Tensor:
    """DARE in place of TIES' trimming, a combination that the DARE paper tries."""
    return _elect_and_mean(dare(tasks, numbers, density, draws), sign)


def magmax(tasks: Sequence[Tensor]) -> Tensor:
    """MagMax (Marczak et al., 2024, arXiv 2407.06322): each element of the adapter that changes it most.

    Of equal changes the later adapter's counts. The paper takes changes of one model trained on task after task, each
    measured from the base.
    """
    chosen = tasks[0]
    for task in tasks[1:]:
        chosen = torch.where(task.abs() >= chosen.abs(), task, chosen)
    return chosen


def _elect_and_mean(tasks: Sequence[Tensor], sign: Sign) -> Tensor:
    stacked = torch.stack(list(tasks))
    return disjoint_merge(stacked, calculate_majority_sign_mask(stacked, method=sign))
