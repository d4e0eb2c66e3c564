"""The parts of the embedded world learn, resume exactly, and come back from disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lit_personalize.backbones.loading import load_base
from lit_personalize.sampling.sampler import SamplingOptions, generate
from lit_personalize.tinyworld.autoencoder import encode_pictures, psnr, train_autoencoder
from lit_personalize.tinyworld.dataset import sample_pictures
from lit_personalize.tinyworld.diffusion import save_pipeline, train_diffusion
from lit_personalize.tinyworld.reader import Reader
from lit_personalize.tinyworld.tokenizer import build_tokenizer
from lit_personalize.tinyworld.training import Stage, run_stage, schedule


def _quiet(_: str) -> None:
    """Training messages are not looked at here."""


def _stage(model: nn.Module, steps: int, seen: list[int] | None = None) -> Stage:
    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        if seen is not None:
            seen.append(step)
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return (model(x) - x.sum(1, keepdim=True)).square().mean(), {}

    return Stage("line", {"model": model}, loss, steps, 0.05, warmup=2, ema=0.9, save_every=5)


def test_a_stage_learns_and_is_not_repeated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    weights = run_stage(_stage(model, 60), tmp_path, _quiet)
    torch.testing.assert_close(model.weight, torch.ones(1, 4), atol=0.2, rtol=0)
    seen: list[int] = []
    again = run_stage(_stage(nn.Linear(4, 1), 60, seen), tmp_path, _quiet)
    assert not seen and all(torch.equal(weights[k], again[k]) for k in weights)


def test_a_stopped_stage_ends_where_an_undisturbed_one_does(tmp_path: Path) -> None:
    class Stopped(Exception):
        """The process ends here."""

    torch.manual_seed(0)
    start = nn.Linear(4, 1).state_dict()

    def fresh() -> nn.Module:
        model = nn.Linear(4, 1)
        model.load_state_dict(start)
        return model

    whole = run_stage(_stage(fresh(), 20), tmp_path / "whole", _quiet)
    stage = _stage(fresh(), 20)
    inner = stage.loss

    def failing(step: int) -> tuple[Tensor, dict[str, float]]:
        if step == 13:
            raise Stopped
        return inner(step)

    stage.loss = failing
    with pytest.raises(Stopped):
        run_stage(stage, tmp_path / "cut", _quiet)
    seen: list[int] = []
    resumed = run_stage(_stage(fresh(), 20, seen), tmp_path / "cut", _quiet)
    assert seen[0] == 10 and all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_a_clock_shortens_and_cools(tmp_path: Path) -> None:
    assert schedule(0.0, 50, 10) == 1 and schedule(1.0, 50, 10) == pytest.approx(0.02)
    stage = _stage(nn.Linear(4, 1), 100_000)
    stage.seconds = 0.5
    run_stage(stage, tmp_path, _quiet)
    assert (tmp_path / "line.final.pt").exists()


def test_from_pictures_to_a_stock_pipeline(tmp_path: Path) -> None:
    """Every stage in a handful of steps; the result loads, samples, and loads in stock diffusers."""
    from diffusers import StableDiffusionPipeline

    pictures = sample_pictures(48, 0)
    vae = train_autoencoder(pictures.pixels, tmp_path, steps=12, log=_quiet)
    assert vae.config.scaling_factor > 0
    tokenizer = build_tokenizer(tmp_path / "tokenizer")
    latents = encode_pictures(vae, pictures.pixels)
    parts = train_diffusion(latents, pictures.scenes, vae.config.scaling_factor, tokenizer, tmp_path, steps=4, batch=4,
                            log=_quiet)  # fmt: skip
    save_pipeline(tmp_path / "base", *parts, vae)
    base = load_base(tmp_path / "base")
    picture = generate(base, ["a red circle"], [0], options=SamplingOptions(steps=2))
    assert picture.shape == (1, 64, 64, 3)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "base", local_files_only=True)
    assert pipe.unet.config.cross_attention_dim == 128


def test_reader_comes_back_from_disk(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reader = Reader().eval()
    reader.save(tmp_path)
    pixels = sample_pictures(4, 0).pixels
    first, again = reader.read(pixels), Reader.load(tmp_path).read(pixels)
    agree = np.mean([a.names[h] == b.names[h] for a, b in zip(first, again, strict=True) for h in a.names])
    assert agree > 0.95  # stored in half precision
    with pytest.raises(Exception, match="uint8 pictures"):
        reader.read(pixels[:, :32])


def test_psnr_of_a_known_error() -> None:
    a = np.zeros((1, 2, 2, 3), dtype=np.uint8)
    assert psnr(a, a + 51) == pytest.approx(20 * np.log10(5))
