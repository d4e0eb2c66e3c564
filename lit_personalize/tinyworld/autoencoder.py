"""The picture autoencoder of the embedded base: a stock `AutoencoderKL` with f = 4.

Trained on random 32x32 crops (it is fully convolutional, and whole pictures train blurry), with an
L1 loss and a light KL term.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from lit_personalize.tinyworld.training import Log, Stage, run_stage

LATENT_CHANNELS = 8
CROP = 32


def new_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3, out_channels=3, sample_size=64, latent_channels=LATENT_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64), layers_per_block=1, norm_num_groups=8, mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)  # fmt: skip


def to_model(pixels: np.ndarray) -> Tensor:
    """uint8 `[B, H, W, 3]` to float `[B, 3, H, W]` in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def random_crops(pixels: np.ndarray, rng: np.random.Generator, batch: int) -> Tensor:
    side = pixels.shape[1] - CROP + 1
    picks = [(rng.integers(len(pixels)), rng.integers(side), rng.integers(side)) for _ in range(batch)]
    return to_model(np.stack([pixels[i, y : y + CROP, x : x + CROP] for i, y, x in picks]))


def train_autoencoder(
    pixels: np.ndarray,
    folder: Path,
    *,
    steps: int = 7000,
    batch: int = 24,
    seconds: float | None = None,
    kl_weight: float = 1e-4,
    seed: int = 0,
    log: Log = print,
) -> AutoencoderKL:
    """Train on crops of `pixels` (uint8 `[N, 64, 64, 3]`) and set the latent scaling factor."""
    torch.manual_seed(seed)
    vae = new_autoencoder()

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([seed, 1, step])
        x = random_crops(pixels, rng, batch).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(seed * 7919 + step))
        y = vae.decode(posterior.mean + posterior.std * noise).sample
        l1, mse = (x - y).abs().mean(), (x - y).square().mean()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        figures = {"psnr": 10 * float(torch.log10(4 / mse.detach())), "kl": float(kl.detach())}
        return l1 + 0.5 * mse + kl_weight * kl, figures

    run_stage(Stage("vae", {"vae": vae}, loss, steps, 2e-3, seconds, weight_decay=1e-4, ema=0.998), folder, log)
    vae.eval().requires_grad_(False)
    mean = encode_pictures(vae, pixels[:2048])[0]
    vae.register_to_config(scaling_factor=round(float(1 / mean.std()), 5))
    return vae


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pixels: np.ndarray, batch: int = 128) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation of every picture, `[N, 8, 16, 16]` each, unscaled."""
    means, stds = [], []
    for start in range(0, len(pixels), batch):
        posterior = vae.encode(to_model(pixels[start : start + batch])).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)
    return torch.cat(means), torch.cat(stds)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pixels: np.ndarray, batch: int = 128) -> np.ndarray:
    """Encode and decode uint8 pictures `[N, 64, 64, 3]`."""
    out = []
    for start in range(0, len(pixels), batch):
        y = vae.decode(vae.encode(to_model(pixels[start : start + batch])).latent_dist.mean).sample
        out.append(((y.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    return np.concatenate(out)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 pictures, from the mean squared error over all."""
    mse = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float(10 * np.log10(255.0**2 / mse))
