"""Sampling: classifier-free guidance with a stock diffusers scheduler and counter-based start noise.

A picture is a function of (base, adapters, prompt, seed, options): not of the batch it is drawn in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import lit_kernels
from lit_personalize import randomness
from lit_personalize.adapters.protocol import Adapter
from lit_personalize.backbones.base import Base, Conditioning
from lit_personalize.errors import UsageError
from lit_personalize.sampling import schedulers
from lit_personalize.sampling.mixing import Prompt, condition
from lit_personalize.sampling.schedulers import SchedulerName

Steering = Callable[[int, int, Conditioning], Conditioning]
"""Called before each prediction with its number, the number of steps, and what the rows of both branches are told
(unconditional ones first); returns what they are told in this one."""


@dataclass(frozen=True)
class SamplingOptions:
    """How pictures are drawn."""

    steps: int = 25
    """Denoising steps."""
    guidance: float = 6.0
    """Classifier-free guidance scale w in ε_u + w (ε_c - ε_u) (Ho & Salimans, 2022, eq. 6 as 1 + w); 1 is off."""
    negative: str = ""
    """The prompt of the unconditional branch; where it is empty, SDXL takes zeros for its states if its base says so
    (`force_zeros_for_empty_prompt`), as the stock pipeline does when no negative prompt is given."""
    scheduler: SchedulerName = "ddim"
    """Which stock scheduler takes the steps, by its name in `schedulers.NAMES`."""
    batch_size: int = 8
    """Pictures drawn at once; does not change them."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"pictures need at least 1 denoising step, not {self.steps}")


def start_noise(base: Base, seeds: Sequence[int], resolution: int | None = None) -> Tensor:
    """One draw per seed, `[N, C, h, w]` fp32, independent of batch and device."""
    pixels = resolution or base.resolution
    if pixels % base.downscale:
        raise UsageError(f"resolution {pixels} is not a multiple of {base.downscale}, the pixels of a latent cell")
    side = pixels // base.downscale
    shape = (base.latent_channels, side, side)
    return torch.cat([randomness.normal(shape, seed, "start", 0, [0]) for seed in seeds]).to(base.device)


@torch.no_grad()
def generate_latents(
    base: Base,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    adapters: Sequence[Adapter] | None = None,
    options: SamplingOptions | None = None,
    resolution: int | None = None,
) -> Tensor:
    """Draw one latent per (prompt, seed): `[N, C, h, w]`, scaled.

    Args:
        prompts: Sentences, or a `Mix` of two.
        adapters: Those to apply; None draws from the untouched base.
    """
    options = options or SamplingOptions()
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds; give one seed per prompt")
    for adapter in adapters or ():
        adapter.refresh(base.dtype)
    latents = []
    with base.only(adapters or ()):
        for start in range(0, len(prompts), options.batch_size):
            part = slice(start, start + options.batch_size)
            z = start_noise(base, seeds[part], resolution)
            latents.append(denoise(base, list(prompts[part]), seeds[part], z, options))
    return torch.cat(latents)


@torch.no_grad()
def denoise(
    base: Base,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    z: Tensor,
    options: SamplingOptions,
    steer: Steering | None = None,
    after_step: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Take start noise `[N, C, h, w]` of unit variance to latents, under the adapters that are active.

    Args:
        seeds: One per picture, of the noise that some schedulers add.
        after_step: Changes the latents that a step gave.
    """
    conditioning = condition(base, prompts)
    guided = options.guidance != 1
    if guided:
        conditioning = unconditional_of(base, options.negative, conditioning).cat(conditioning)
    scheduler = schedulers.scheduler_of(base, options.scheduler, options.steps)
    z = z * scheduler.init_noise_sigma
    steps = len(scheduler.timesteps)
    frozen: AbstractContextManager[None] = nullcontext()
    if steer is None and all(type(adapter).at is Adapter.at for adapter in base.adapters):
        conditioning = replace(conditioning, states=conditioning.states.to(base.dtype))  # one tensor for all steps
        frozen = lit_kernels.frozen(base.unet, steps)
    with frozen:
        for number, t in enumerate(scheduler.timesteps):
            for adapter in base.adapters:
                adapter.at(number / steps, float(t))
            if steer is not None:
                conditioning = steer(number, steps, conditioning)
            model_input = scheduler.scale_model_input(torch.cat([z, z]) if guided else z, t)
            out = base.predict_active(model_input, t.expand(len(model_input)).to(base.device), conditioning)
            if guided:
                unconditional, conditional = out.chunk(2)
                out = unconditional + options.guidance * (conditional - unconditional)
            z = schedulers.step(scheduler, out, t, z, seeds, number)
            z = z if after_step is None else after_step(z)
    return z


def unconditional_of(base: Base, negative: str, conditioning: Conditioning) -> Conditioning:
    """What the unconditional branch is told, one row for each of `conditioning`."""
    if negative or not base.force_zeros_for_empty_prompt:
        return _repeat(base.condition([negative]), len(conditioning))
    return conditioning.zeroed(torch.ones(len(conditioning), dtype=torch.bool, device=conditioning.states.device))


def _repeat(c: Conditioning, n: int) -> Conditioning:
    pooled, time_ids = (None if x is None else x[:1].expand(n, *x.shape[1:]) for x in (c.pooled, c.time_ids))
    return Conditioning(c.states[:1].expand(n, *c.states.shape[1:]), pooled, time_ids)


def generate(
    base: Base,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    adapters: Sequence[Adapter] | None = None,
    options: SamplingOptions | None = None,
    resolution: int | None = None,
) -> np.ndarray:
    """Draw one picture per (prompt, seed): uint8 `[N, H, W, 3]`; a prompt is a sentence, or a `Mix` of two."""
    options = options or SamplingOptions()
    return to_pictures(base, generate_latents(base, prompts, seeds, adapters, options, resolution), options.batch_size)


def to_pictures(base: Base, latents: Tensor, batch_size: int = 8) -> np.ndarray:
    """Decode scaled latents: uint8 `[N, H, W, 3]`."""
    parts = [base.decode(latents[i : i + batch_size]) for i in range(0, len(latents), batch_size)]
    pixels = ((torch.cat(parts) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def sample(
    prompts: Sequence[Prompt],
    base: str = "tinyworld",
    adapters: Sequence[str | Path] = (),
    seeds: Sequence[int] = (0,),
    options: SamplingOptions | None = None,
    resolution: int | None = None,
) -> np.ndarray:
    """Load a base and adapter files, and draw every prompt with every seed.

    Returns:
        uint8 `[len(prompts) · len(seeds), H, W, 3]`, prompts outermost.

    Raises:
        DataError: The base or an adapter file is missing, damaged, or made for another base.
    """
    from lit_personalize.backbones.loading import load_base
    from lit_personalize.export.loading import load_adapter

    loaded = load_base(base)
    attached = [load_adapter(Path(path), loaded) for path in adapters]
    asked = [prompt for prompt in prompts for _ in seeds]
    return generate(loaded, asked, list(seeds) * len(prompts), attached, options, resolution)
