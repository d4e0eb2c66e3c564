"""Photos as start latents: exact where the prediction is, better with null-text states; on the embedded world."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.errors import UsageError
from lit_personalize.sampling.inversion import NullTextOptions, affine_steps, invert, latent_of
from lit_personalize.sampling.prompt_to_prompt import EditOptions, edit_latents
from lit_personalize.sampling.sampler import SamplingOptions, start_noise
from lit_personalize.sampling.schedulers import scheduler_of
from lit_personalize.tinyworld.captions import caption
from lit_personalize.tinyworld.dataset import sample_pictures

STEPS = 10


@pytest.fixture(scope="module")
def world() -> Base:
    return load_base("tinyworld")


@pytest.fixture(scope="module")
def photos(world: Base) -> list[tuple[str, Tensor]]:
    pictures = sample_pictures(2, 5, "test", kind="object")
    return [(caption(s), latent_of(world, p)) for s, p in zip(pictures.scenes, pictures.pixels, strict=True)]


def rms(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


@pytest.mark.parametrize("family", ["sd1", "sd2-v"])
def test_a_step_is_affine_as_the_scheduler_takes_it(tiny_bases: dict[str, Path], family: str) -> None:
    base = load_base(tiny_bases[family])
    scheduler = scheduler_of(base, "ddim", 5)
    draws = torch.Generator().manual_seed(0)
    z, f = (torch.randn(1, 4, 4, 4, generator=draws, dtype=torch.float64) for _ in range(2))
    for t, (a, b) in zip(scheduler.timesteps, affine_steps(scheduler), strict=True):
        expected = scheduler.step(f, t, z, return_dict=False)[0]
        torch.testing.assert_close(a * z + b * f, expected, rtol=1e-5, atol=1e-6)


def test_an_inverted_latent_is_drawn_again(world: Base, photos: list[tuple[str, Tensor]]) -> None:
    """Without guidance, in 10 steps: within 0.3 of the latent's deviation, and refined within a third of that."""
    options = SamplingOptions(steps=STEPS, guidance=1)
    for prompt, latent in photos:
        errors = []
        for refinements in (0, 5):
            found = invert(world, prompt, latent, (), options, refinements=refinements)
            assert len(found.path) == STEPS + 1 and torch.equal(found.path[-1], latent)
            errors.append(rms(edit_latents(world, prompt, [], found.path[0], (), options), latent))
        assert errors[0] < 0.3 * float(latent.std()) and errors[1] < errors[0] / 3, errors


def test_null_text_states_keep_guided_sampling_on_the_path(world: Base, photos: list[tuple[str, Tensor]]) -> None:
    options = SamplingOptions(steps=STEPS, guidance=4)
    for prompt, latent in photos[:2]:
        plain = invert(world, prompt, latent, (), options)
        learned = invert(world, prompt, latent, (), options, NullTextOptions(iterations=5))
        assert learned.unconditional is not None and len(learned.unconditional) == STEPS
        before = rms(edit_latents(world, prompt, [], plain.path[0], (), options), latent)
        start, states = learned.path[0], learned.unconditional
        after = edit_latents(world, prompt, [], start, (), options, unconditional=states)
        assert rms(after, latent) < 0.85 * before
        again = edit_latents(world, prompt, [prompt], start, (), options, EditOptions(), states)
        torch.testing.assert_close(again[1:], after, rtol=1e-4, atol=1e-4)


def test_states_of_no_update_are_the_empty_prompts(tiny_bases: dict[str, Path]) -> None:
    """So the loop of null-text inversion is the sampler's; SDXL's pooled states stay as they were."""
    base = load_base(tiny_bases["sdxl"])
    options = SamplingOptions(steps=3, guidance=3)
    latent = start_noise(base, [9])
    found = invert(base, "a cat", latent, (), options, NullTextOptions(iterations=0))
    with_states = edit_latents(base, "a cat", ["a dog"], latent, (), options, unconditional=found.unconditional)
    plain = edit_latents(base, "a cat", ["a dog"], latent, (), options)
    torch.testing.assert_close(with_states, plain, rtol=1e-5, atol=1e-5)


def test_the_middle_square_is_encoded(world: Base) -> None:
    wide = np.zeros((64, 100, 3), np.uint8)
    wide[:, 18:82] = sample_pictures(1, 5, "test", kind="object").pixels[0]
    torch.testing.assert_close(latent_of(world, wide), latent_of(world, wide[:, 18:82]), rtol=0, atol=0)
    assert latent_of(world, wide, 32).shape[-2:] == (8, 8)
    with pytest.raises(UsageError, match="resolution 33 is not a multiple of 4"):
        latent_of(world, wide, 33)


def test_wrong_ways_are_one_sentence(world: Base, photos: list[tuple[str, Tensor]]) -> None:
    prompt, latent = photos[0]
    with pytest.raises(UsageError, match="DDIM's path, not dpm's"):
        invert(world, prompt, latent, (), SamplingOptions(steps=2, scheduler="dpm"))
    with pytest.raises(UsageError, match="guidance 1 has no unconditional branch"):
        invert(world, prompt, latent, (), SamplingOptions(steps=2, guidance=1), NullTextOptions())
    with pytest.raises(UsageError, match="guidance 1 has no unconditional branch"):
        states = torch.zeros(2, 40, 128)
        edit_latents(world, prompt, [], latent, (), SamplingOptions(steps=2, guidance=1), unconditional=states)
