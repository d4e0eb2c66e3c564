"""Real photographs as start latents: DDIM inversion and null-text inversion.

A DDIM step is affine in the latent, z_{t-1} = a_t z_t + b_t f(z_t, t) with the UNet's prediction f of any type.
DDIM inversion (Song et al., 2020, arXiv 2010.02502, sec. 4.3) runs it backwards with f(z_{t-1}, t) in place of
f(z_t, t), without guidance: z_t = (z_{t-1} - b_t f) / a_t. Null-text inversion (Mokady et al., 2022, arXiv 2211.09794,
sec. 3.2, alg. 1) then learns, step by step, text states of the unconditional branch that keep guided sampling on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_personalize.adapters.protocol import Adapter
from lit_personalize.backbones.base import Base, Conditioning
from lit_personalize.errors import UsageError
from lit_personalize.sampling.sampler import SamplingOptions, unconditional_of
from lit_personalize.sampling.schedulers import scheduler_of


@dataclass(frozen=True)
class NullTextOptions:
    """How unconditional states are learned; the defaults are the paper's."""

    iterations: int = 10
    """Most updates per denoising step."""
    lr: float = 1e-2
    """Of Adam in the first step; it falls to lr (1 - i / 100), at least a hundredth of it, in step i."""
    tolerance: float = 1e-5
    """A step ends when its mean squared error falls below this + 2e-5 i."""


@dataclass(frozen=True)
class Inversion:
    """A photo's path through noise: `path[0]` is the start latent, `path[-1]` the photo's, each `[1, C, h, w]`."""

    path: list[Tensor]
    unconditional: Tensor | None = None
    """States of the unconditional branch by step `[steps, S, E]`, if null-text inversion learned them."""


def latent_of(base: Base, picture: np.ndarray, resolution: int | None = None) -> Tensor:
    """Encode the middle square of a picture uint8 `[H, W, 3]`: the posterior's mean, scaled, `[1, C, h, w]`."""
    from PIL import Image

    pixels = resolution or base.resolution
    if pixels % base.downscale:
        raise UsageError(f"resolution {pixels} is not a multiple of {base.downscale}, the pixels of a latent cell")
    height, width = picture.shape[:2]
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    square = Image.fromarray(picture).crop((left, top, left + side, top + side))
    resized = np.array(square.resize((pixels, pixels), Image.Resampling.LANCZOS))
    values = torch.from_numpy(resized).permute(2, 0, 1)[None].float() / 127.5 - 1
    return base.scale_latents(base.encode_pixels(values)[0])


def affine_steps(scheduler: Any) -> list[tuple[float, float]]:
    """(a, b) of every DDIM step in sampling order, from the scheduler itself."""
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    steps = []
    for t in scheduler.timesteps.cpu():
        a, b = (float(scheduler.step(f, t, z, return_dict=False)[0]) for f, z in ((zero, one), (one, zero)))
        steps.append((a, b))
    return steps


def invert(
    base: Base,
    prompt: str,
    latent: Tensor,
    adapters: Sequence[Adapter] = (),
    options: SamplingOptions | None = None,
    null_text: NullTextOptions | None = None,
    refinements: int = 0,
) -> Inversion:
    """Find a start from which the photo's latent `[1, C, h, w]` is drawn again.

    Args:
        prompt: What the photo shows.
        options: Those of the sampling to come; its guidance counts for null-text inversion alone.
        null_text: Also learn unconditional states; None is plain DDIM inversion.
        refinements: Times that each step's prediction is asked again at the latent that it led to, which makes the
            backward step exact where it converges (fixed-point inversion, Pan et al., 2023, arXiv 2309.04907).

    Raises:
        UsageError: Another scheduler than DDIM, or null-text inversion without guidance.
    """
    options = options or SamplingOptions()
    if options.scheduler != "ddim":
        raise UsageError(f"a photo is inverted along DDIM's path, not {options.scheduler}'s; leave the scheduler out")
    if null_text is not None and options.guidance == 1:
        raise UsageError("guidance 1 has no unconditional branch for null-text states; invert by ddim, or raise it")
    for adapter in adapters:
        adapter.refresh(base.dtype)
    with base.only(adapters), torch.no_grad():
        path = _ddim_path(base, prompt, latent, options, refinements)
        states = None if null_text is None else _null_text(base, prompt, path, options, null_text)
    return Inversion(path, states)


def _ddim_path(base: Base, prompt: str, latent: Tensor, options: SamplingOptions, refinements: int) -> list[Tensor]:
    conditioning = base.condition([prompt])
    scheduler = scheduler_of(base, options.scheduler, options.steps)
    path = [latent]
    for number, (a, b) in reversed(list(enumerate(affine_steps(scheduler)))):
        z = path[0]
        for _ in range(1 + refinements):
            z = (path[0] - b * _predict(base, number, scheduler, z, conditioning)) / a
        path.insert(0, z)
    return path


def _predict(base: Base, number: int, scheduler: Any, z: Tensor, conditioning: Conditioning) -> Tensor:
    for adapter in base.adapters:
        adapter.at(number / len(scheduler.timesteps), float(scheduler.timesteps[number]))
    return base.predict_active(z, scheduler.timesteps[number].expand(len(z)).to(base.device), conditioning)


def _null_text(base: Base, prompt: str, path: list[Tensor], options: SamplingOptions, how: NullTextOptions) -> Tensor:
    """States `[steps, S, E]`; each starts from the one before and pulls the guided step to the path."""
    conditioning = base.condition([prompt])
    empty = unconditional_of(base, options.negative, conditioning)
    scheduler = scheduler_of(base, options.scheduler, options.steps)
    states, z, learned = empty.states.float(), path[0], []
    for number, affine in enumerate(affine_steps(scheduler)):
        conditional = _predict(base, number, scheduler, z, conditioning)
        with torch.enable_grad():
            states = states.clone().requires_grad_()
            optimizer = torch.optim.Adam([states], lr=how.lr * max(0.01, 1 - number / 100))
            for _ in range(how.iterations):
                told = Conditioning(states, empty.pooled, empty.time_ids)
                found = _predict(base, number, scheduler, z, told)
                loss = (_guided(z, affine, found, conditional, options.guidance) - path[number + 1]).square().mean()
                if float(loss.detach()) < how.tolerance + 2e-5 * number:
                    break
                (states.grad,) = torch.autograd.grad(loss, states)
                optimizer.step()
        states = states.detach()
        found = _predict(base, number, scheduler, z, Conditioning(states, empty.pooled, empty.time_ids))
        z = _guided(z, affine, found, conditional, options.guidance)
        learned.append(states)
    return torch.cat(learned)


def _guided(z: Tensor, affine: tuple[float, float], found: Tensor, conditional: Tensor, guidance: float) -> Tensor:
    return affine[0] * z + affine[1] * (found + guidance * (conditional - found))
