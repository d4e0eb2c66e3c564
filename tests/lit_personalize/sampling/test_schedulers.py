"""Schedulers: each reaches the distribution that its model describes; no picture depends on its batch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.cli.main import main
from lit_personalize.errors import UsageError
from lit_personalize.sampling.sampler import SamplingOptions, generate, start_noise
from lit_personalize.sampling.schedulers import NAMES, NOISY, scheduler_of, step

MEAN, SPREAD = 3.0, 0.5  # beyond [-1, 1]: a scheduler that clips is far off


@pytest.fixture(scope="module")
def base(tiny_bases: dict[str, Path]) -> Base:
    """Its scheduler clips, as that of models of pixels does: none of ours may."""
    base = load_base(tiny_bases["sd1"])
    base.scheduler.register_to_config(clip_sample=True)
    return base


def denoised(base: Base, name: str, steps: int, seeds: list[int]) -> torch.Tensor:
    """Draw with the exact prediction for data of N(MEAN, SPREAD²), which is ε = E[ε | z_t], from its true start."""
    scheduler = scheduler_of(base, name, steps)
    alphas = base.schedule.alphas_cumprod.double()

    def parts(t: torch.Tensor) -> tuple[float, float, float]:
        alpha = float(np.interp(float(t), range(len(alphas)), alphas))
        return math.sqrt(alpha), math.sqrt(1 - alpha), alpha * SPREAD**2 + 1 - alpha

    signal, _, variance = parts(scheduler.timesteps[0])
    z = signal * MEAN + math.sqrt(variance) * start_noise(base, seeds)
    z = z if float(scheduler.init_noise_sigma) == 1 else z / signal  # some count in z0 + σε
    for number, t in enumerate(scheduler.timesteps):
        signal, noise, variance = parts(t)
        out = noise * (scheduler.scale_model_input(z, t) - signal * MEAN) / variance
        z = step(scheduler, out, t, z, seeds, number)
    return z


@pytest.mark.parametrize("name", NAMES)
def test_reaches_the_distribution(base: Base, name: str) -> None:
    z = denoised(base, name, 50, [0, 1, 2, 3])
    assert abs(float(z.mean()) - MEAN) < 0.05
    # LCM answers with E[z0 | z_t] at the end, from a teacher's 50 steps: no spread is promised.
    assert name == "lcm" or abs(float(z.std()) - SPREAD) < 0.06


@pytest.mark.parametrize("name", NAMES)
def test_noise_belongs_to_the_picture(base: Base, name: str) -> None:
    together, alone = denoised(base, name, 6, [5, 7]), denoised(base, name, 6, [7])
    assert torch.equal(together[1:], alone)


@pytest.mark.parametrize("name", NOISY)
def test_every_step_draws_anew(base: Base, name: str) -> None:
    scheduler = scheduler_of(base, name, 4)
    t, z, out = scheduler.timesteps[0], start_noise(base, [0]), torch.zeros(1, 4, 16, 16)
    found = []
    for seed, number in ((0, 0), (0, 1), (1, 0)):
        fresh = scheduler_of(base, name, 4)
        fresh.scale_model_input(z, t)
        found.append(step(fresh, out, t, z, [seed], number))
    differences = [(a - found[0]).flatten() for a in found[1:]]
    assert all(float(d.std()) > 0 for d in differences) and not torch.equal(found[1], found[2])
    assert abs(float(torch.corrcoef(torch.stack([f.flatten() - z.flatten() for f in found]))[0, 1])) < 0.9


@pytest.mark.parametrize("name", ["ddpm", "euler-ancestral", "dpm-single"])
def test_a_picture_does_not_depend_on_its_batch(tiny_bases: dict[str, Path], name: str) -> None:
    base = load_base(tiny_bases["sd2-v"])
    how = {"steps": 3, "guidance": 2.0, "scheduler": name}
    together = generate(base, ["a cat", "a dog"], [1, 2], options=SamplingOptions(**how, batch_size=2))  # type: ignore[arg-type]
    alone = generate(base, ["a cat", "a dog"], [1, 2], options=SamplingOptions(**how, batch_size=1))  # type: ignore[arg-type]
    assert np.abs(together.astype(int) - alone.astype(int)).max() <= 1
    assert together.std() > 0 and not np.array_equal(together[0], together[1])


@pytest.fixture(scope="module")
def pipe(tiny_bases: dict[str, Path]) -> Any:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_bases["sd1"], local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", ["euler", "heun", "pndm", "unipc"])  # scaled input, two predictions, one more, memory
def test_draws_what_the_stock_pipeline_draws(base: Base, pipe: Any, name: str) -> None:
    own = scheduler_of(base, name, 4)
    pipe.scheduler = type(own).from_config(own.config)
    stock = pipe("a cat", negative_prompt="", num_inference_steps=4, guidance_scale=3.0, height=32, width=32,
                 latents=start_noise(base, [7]), output_type="np").images[0]  # fmt: skip
    ours = generate(base, ["a cat"], [7], options=SamplingOptions(steps=4, guidance=3.0, scheduler=name))  # type: ignore[arg-type]
    assert np.abs(ours[0] / 255.0 - stock).max() <= 1 / 255 + 1e-5


def test_what_cannot_be_is_refused(
    base: Base, tiny_bases: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="unknown scheduler 'eular'; use one of ddim, ddpm"):
        scheduler_of(base, "eular", 4)
    given = ["sample", "a cat", "--base", str(tiny_bases["sd1"]), "-o", str(tmp_path)]
    assert main([*given, "--scheduler", "lcm", "--steps", "60"]) == 2
    assert "takes at most 50 steps on this base, not 60" in capsys.readouterr().err
