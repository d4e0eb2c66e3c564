"""Sampling: equal to the stock pipelines, independent of batching, guidance off and on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import lit_kernels
from lit_kernels.text_kv.source import TextKeyValues
from lit_personalize.adapters.lora import LoRA
from lit_personalize.backbones.loading import load_base
from lit_personalize.export.stock import comparison_scheduler
from lit_personalize.sampling.sampler import SamplingOptions, generate, generate_latents, start_noise


@pytest.mark.parametrize("family", ["sd1", "sd2-v", "sdxl"])
def test_draws_what_the_stock_pipeline_draws(tiny_bases: dict[str, Path], family: str) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    base = load_base(tiny_bases[family])
    options = SamplingOptions(steps=4, guidance=3.0)
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    pipe = kind.from_pretrained(tiny_bases[family], local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    if family == "sdxl":
        pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer.eos_token_id
    side = {"height": 32, "width": 32}
    stock = pipe("a photo of a cat", negative_prompt="", num_inference_steps=4, guidance_scale=3.0,
                 latents=start_noise(base, [7]), output_type="np", **side).images[0]  # fmt: skip
    ours = generate(base, ["a photo of a cat"], [7], options=options)[0]
    assert np.abs(ours / 255.0 - stock).max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize("negative", ["", "a dog"])
@pytest.mark.parametrize("zeros", [True, False, None])
def test_an_empty_negative_prompt_of_sdxl_follows_its_base(
    tiny_bases: dict[str, Path], tmp_path: Path, zeros: bool | None, negative: str
) -> None:
    """`force_zeros_for_empty_prompt` of the index (true where it says nothing) as the stock pipeline reads it."""
    from diffusers import StableDiffusionXLPipeline

    folder = shutil.copytree(tiny_bases["sdxl"], tmp_path / "base")
    index = json.loads((folder / "model_index.json").read_text())
    del index["force_zeros_for_empty_prompt"]
    flag = {} if zeros is None else {"force_zeros_for_empty_prompt": zeros}
    (folder / "model_index.json").write_text(json.dumps({**index, **flag}))
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    base = load_base(folder)
    pipe.scheduler = comparison_scheduler(pipe.scheduler)
    pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer.eos_token_id
    stock = pipe("a photo of a cat", negative_prompt=negative or None, num_inference_steps=4, guidance_scale=5.0,
                 latents=start_noise(base, [7]), output_type="np", height=32, width=32).images[0]  # fmt: skip
    options = SamplingOptions(steps=4, guidance=5.0, negative=negative)
    ours = generate(base, ["a photo of a cat"], [7], options=options)[0]
    assert np.abs(ours / 255.0 - stock).max() <= 1 / 255 + 1e-6
    base.force_zeros_for_empty_prompt = not base.force_zeros_for_empty_prompt
    other = generate(base, ["a photo of a cat"], [7], options=options)[0]
    assert (np.abs(other.astype(int) - ours).max() > 2) == (negative == "")


def test_a_picture_does_not_depend_on_its_batch(tiny_bases: dict[str, Path]) -> None:
    base = load_base(tiny_bases["sd1"])
    prompts, seeds = ["a cat", "a dog", "a toy"], [1, 2, 3]
    together = generate(base, prompts, seeds, options=SamplingOptions(steps=3, batch_size=3))
    alone = generate(base, prompts, seeds, options=SamplingOptions(steps=3, batch_size=1))
    assert np.abs(together.astype(int) - alone.astype(int)).max() <= 1
    assert not np.array_equal(together[0], together[1])


def test_adapters_apply_only_when_named(tiny_bases: dict[str, Path]) -> None:
    base = load_base(tiny_bases["sd1"])
    options = SamplingOptions(steps=2, guidance=1.0)
    before = generate(base, ["a cat"], [0], options=options)
    adapter = LoRA(rank=2)
    adapter.attach(base)
    with torch.no_grad():
        for factor in adapter.factors.values():
            factor.add_(0.5)
    assert np.array_equal(generate(base, ["a cat"], [0], options=options), before)
    assert not np.array_equal(generate(base, ["a cat"], [0], [adapter], options), before)


def test_prompts_and_seeds_must_match(tiny_bases: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        generate(load_base(tiny_bases["sd1"]), ["a", "b"], [0])


def test_kernels_project_the_text_once(tiny_bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless an adapter changes on the way."""
    base = load_base(tiny_bases["sdxl"])
    adapter = LoRA(rank=2)
    adapter.attach(base)
    with torch.no_grad():
        for factor in adapter.factors.values():
            factor.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    given = (["a cat", "a dog"], [0, 1], [adapter], SamplingOptions(steps=4, guidance=3.0))
    expected = generate_latents(base, *given)
    projected: list[int] = []
    original = TextKeyValues.of
    monkeypatch.setattr(TextKeyValues, "of", lambda *args: projected.append(1) or original(*args))
    lit_kernels.patch(base.unet, backend="fallback")
    torch.testing.assert_close(generate_latents(base, *given), expected, atol=1e-4, rtol=1e-4)
    assert len(projected) == 1

    class Fading(LoRA):
        """Stronger at first."""

        def at(self, progress: float, timestep: float = 0.0) -> None:
            pass

    Fading(rank=2, name="fading").attach(base)
    torch.testing.assert_close(generate_latents(base, *given), expected, atol=1e-4, rtol=1e-4)
    assert len(projected) == 1 + 4
