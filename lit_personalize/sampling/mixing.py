"""Pictures between two prompts: text states mixed token by token, c_α = (1 - α)·c_1 + α·c_2.

The states of SDXL's pooled vector are mixed with the same α; sizes and the unconditional branch are untouched. Both
prompts should have the same layout of tokens ("a photo of a cat", "a photo of a tiger"), since states are mixed place
by place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_personalize.backbones.base import Base, Conditioning
from lit_personalize.errors import UsageError

NEARLY_ALIKE = 1e-4
"""Sine of the angle between two states below which they are mixed along the line: the sphere says nothing there."""


@dataclass(frozen=True)
class Mix:
    """A prompt between two others.

    Args:
        alpha: Share of the second, in [0, 1]; at 0 and 1 the states are those of one prompt, bit for bit.
        spherical: Along the great circle between each pair of states, in place of the straight line.
    """

    first: str
    second: str
    alpha: float
    spherical: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"a mix takes a share in [0, 1] of its second prompt, not {self.alpha}")

    def __str__(self) -> str:
        return f"{1 - self.alpha:g} {self.first} + {self.alpha:g} {self.second}"


Prompt = str | Mix


def condition(base: Base, prompts: Sequence[Prompt]) -> Conditioning:
    """Conditioning of prompts and mixes, one row each."""
    first = base.condition([p.first if isinstance(p, Mix) else p for p in prompts])
    if not any(isinstance(p, Mix) for p in prompts):
        return first
    second = base.condition([p.second if isinstance(p, Mix) else p for p in prompts])
    alphas = torch.tensor([p.alpha if isinstance(p, Mix) else 0.0 for p in prompts], device=first.states.device)
    round_ = torch.tensor([isinstance(p, Mix) and p.spherical for p in prompts], device=first.states.device)
    return interpolate(first, second, alphas, round_)


def interpolate(first: Conditioning, second: Conditioning, alphas: Tensor, spherical: Tensor) -> Conditioning:
    """Mix two conditionings of B rows.

    Args:
        alphas: `[B]` in [0, 1].
        spherical: bool `[B]`.
    """
    pooled = None
    if first.pooled is not None and second.pooled is not None:
        pooled = _between(first.pooled, second.pooled, alphas[:, None], spherical[:, None])
    states = _between(first.states, second.states, alphas[:, None, None], spherical[:, None, None])
    return Conditioning(states, pooled, first.time_ids)


def _between(a: Tensor, b: Tensor, alpha: Tensor, spherical: Tensor) -> Tensor:
    """Of vectors along the last dimension; in fp32, and exact at both ends."""
    alpha = alpha.float()
    mixed = torch.where(spherical, slerp(a.float(), b.float(), alpha), torch.lerp(a.float(), b.float(), alpha))
    return mixed.to(a.dtype)


def slerp(a: Tensor, b: Tensor, alpha: Tensor) -> Tensor:
    """Spherical interpolation of vectors `[..., d]` (Shoemake, 1985): sin((1-α)θ)/sin θ·a + sin(αθ)/sin θ·b.

    θ is the angle between them; where they (nearly) point in one direction or against each other, it is the line.
    """
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)[..., None].clamp(-1, 1)
    angle = cosine.acos()
    sine = angle.sin()
    usable = sine > NEARLY_ALIKE
    safe = torch.where(usable, sine, torch.ones_like(sine))
    curved = ((1 - alpha) * angle).sin() / safe * a + (alpha * angle).sin() / safe * b
    return torch.where(usable, curved, torch.lerp(a, b, alpha))
