"""Stock diffusers schedulers by name, and noise that does not depend on the batch.

A scheduler draws from the generator that it is handed. Ours are made anew for every step and every picture from
(seed, step), so a picture of DDPM, Euler ancestral or LCM is, like every other, a function of its seed alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from lit_personalize import errors

if TYPE_CHECKING:  # `litp sample --help` reads the names and loads no torch
    import torch
    from torch import Tensor

    from lit_personalize.backbones.base import Base

SchedulerName = Literal[
    "ddim", "ddpm", "pndm", "euler", "euler-ancestral", "heun", "lms", "dpm", "dpm-single", "unipc", "lcm"
]
NAMES: tuple[str, ...] = get_args(SchedulerName)
NOISY = ("ddpm", "euler-ancestral", "lcm")
"""Those that add noise at each step."""
# Latents are no pixels: they reach far beyond [-1, 1], to which some schedulers would clip them by default.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {"clip_sample": False}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpm": ("DPMSolverMultistepScheduler", {}),
    "dpm-single": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
}


def scheduler_of(base: Base, name: str, steps: int) -> Any:
    """A stock scheduler with the base's noise schedule and prediction type, set to `steps` steps.

    Raises:
        UsageError: There is no such scheduler, it cannot take so many steps, or a package that it needs is missing.
    """
    import diffusers

    if name not in KINDS:
        raise errors.UsageError(f"unknown scheduler {name!r}; use one of {', '.join(KINDS)}")
    kind, extra = KINDS[name]
    if name == "lms" and not diffusers.utils.is_scipy_available():
        raise errors.UsageError("the scheduler lms needs SciPy: pip install scipy, or use another scheduler")
    scheduler = getattr(diffusers, kind).from_config(base.scheduler.config, **extra)
    # LCM's steps are some of those of its teacher, 50 unless the base says otherwise.
    most = getattr(scheduler.config, "original_inference_steps", scheduler.config.num_train_timesteps)
    if steps > most:
        raise errors.UsageError(f"the scheduler {name} takes at most {most} steps on this base, not {steps}")
    scheduler.set_timesteps(steps, device=base.device)
    return scheduler


def step(scheduler: Any, out: Tensor, t: Tensor, z: Tensor, seeds: Sequence[int], number: int) -> Tensor:
    """The latents after one step, `[N, C, h, w]`.

    Args:
        out: What the model predicted for `z` at `t`.
        seeds: One per picture.
        number: Of the step, from 0; for Heun, of the prediction.
    """
    noise = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        noise["generator"] = [_generator(seed, number) for seed in seeds]
    return scheduler.step(out, t, z, return_dict=False, **noise)[0]


def _generator(seed: int, number: int) -> torch.Generator:
    """On the CPU, so that a picture's noise is the same on every device."""
    import torch

    from lit_personalize import randomness

    drawn = randomness.generator(seed, "scheduler", number).integers(2**63)
    return torch.Generator().manual_seed(int(drawn))
