"""The text-to-image part of the embedded base: a small stock UNet and CLIP text encoder, trained together.

v-prediction (Salimans & Ho, 2022) on DDPM's linear schedule: its last step holds almost no signal,
so that plain backgrounds are drawn from the caption and not from leaked brightness.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from lit_personalize.backbones.noise import NoiseSchedule
from lit_personalize.tinyworld.autoencoder import LATENT_CHANNELS
from lit_personalize.tinyworld.captions import caption
from lit_personalize.tinyworld.scene import Scene
from lit_personalize.tinyworld.tokenizer import build_tokenizer
from lit_personalize.tinyworld.training import Log, Stage, run_stage

TEXT_WIDTH = 128
CAPTION_DROPOUT = 0.1
UNIFORM_SHARE = 0.25  # of the timesteps; the others follow a logit-normal
LOGIT_MEAN, LOGIT_STD = 0.5, 1.0
# Shapes take longest to learn, small ones longest of all: shares of each batch drawn from these alone.
OBJECT_SHARE, SMALL_SHARE = 0.3, 0.2


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction",
    )  # fmt: skip


def new_text_encoder(tokenizer: Any) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length, projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def new_unet() -> UNet2DConditionModel:
    """Cross-attention at 16x16 and 8x8, a plain level at 4x4; 4.4 M parameters."""
    return UNet2DConditionModel(
        sample_size=16, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(48, 96, 128), cross_attention_dim=TEXT_WIDTH, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip


def draw_timesteps(count: int, total: int, generator: torch.Generator) -> Tensor:
    """Timesteps `[count]` for training, denser where the caption decides what is drawn.

    Logit-normal (Esser et al., 2024, sec. 3.1) with its median at 0.62 of the schedule, mixed with
    uniform draws. Weights that favour high signal-to-noise ratios (min-SNR) must not be added:
    under v-prediction they all but remove the steps in which a shape is chosen.
    """
    logits = LOGIT_MEAN + LOGIT_STD * torch.randn(count, generator=generator)
    uniform = torch.rand(count, generator=generator)
    where = torch.rand(count, generator=generator) < UNIFORM_SHARE
    return (torch.where(where, uniform, logits.sigmoid()) * total).long().clamp_(max=total - 1)


def train_diffusion(
    latents: tuple[Tensor, Tensor],
    scenes: list[Scene],
    scaling_factor: float,
    tokenizer: Any,
    folder: Path,
    *,
    steps: int = 12_000,
    batch: int = 32,
    learning_rate: float = 1e-3,
    seconds: float | None = None,
    seed: int = 0,
    start: Path | None = None,
    log: Log = print,
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Train on VAE posteriors `(mean, std)`, both `[N, 8, 16, 16]` unscaled, and the captions of `scenes`.

    Args:
        start: A world whose UNet and text encoder are trained on; None begins with random weights.
    """
    torch.manual_seed(seed)
    unet, text_encoder = new_unet(), new_text_encoder(tokenizer)
    if start is not None:
        for module, name in ((unet, "unet"), (text_encoder, "text_encoder")):
            known = type(module).from_pretrained(start / "base" / name, local_files_only=True)
            module.load_state_dict({k: t.float() for k, t in known.state_dict().items()})
    schedule = NoiseSchedule.of_scheduler(new_scheduler())
    mean, std = latents
    objects = np.flatnonzero([scene.kind == "object" for scene in scenes])
    small = np.array([i for i in objects if scenes[i].things[0].size == "small"], dtype=int)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([seed, 2, step])
        rows = rng.integers(len(scenes), size=batch)
        done = 0
        for pool, share in ((objects, OBJECT_SHARE), (small, SMALL_SHARE)):
            extra = round(share * batch) if len(pool) else 0
            rows[done : done + extra] = pool[rng.integers(max(1, len(pool)), size=extra)]
            done += extra
        picks = torch.from_numpy(rows)
        captions = ["" if rng.random() < CAPTION_DROPOUT else caption(scenes[int(i)], rng) for i in picks]
        ids = tokenizer(captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length,
                        return_tensors="pt").input_ids  # fmt: skip
        draws = torch.Generator().manual_seed(seed * 7919 + step)
        z = mean[picks] + std[picks] * torch.randn(batch, *mean.shape[1:], generator=draws)
        z = z * scaling_factor
        noise = torch.randn(z.shape, generator=draws)
        t = draw_timesteps(batch, len(schedule), draws)
        prediction = unet(schedule.add_noise(z, noise, t), t, text_encoder(ids).last_hidden_state).sample
        error = (prediction - schedule.target(z, noise, t)).square().mean((1, 2, 3))
        early = error.detach()[t >= 0.6 * len(schedule)]
        return error.mean(), {"early": float(early.mean()) if len(early) else 0.0}

    modules: dict[str, nn.Module] = {"unet": unet, "text_encoder": text_encoder}
    run_stage(Stage("base", modules, loss, steps, learning_rate, seconds, warmup=200, ema=0.9985), folder, log)
    return unet.eval(), text_encoder.eval()


def save_pipeline(
    folder: Path, unet: nn.Module, text_encoder: nn.Module, vae: AutoencoderKL, half: bool = True
) -> None:
    """Write a stock Stable Diffusion directory, weights in fp16 safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, module in (("unet", unet), ("text_encoder", text_encoder), ("vae", vae)):
        dtype = next(module.parameters()).dtype
        (module.half() if half else module).save_pretrained(folder / name)  # type: ignore[operator]
        module.to(dtype)
        config = folder / name / "config.json"  # without the path from which a part was once loaded
        kept = {k: v for k, v in json.loads(config.read_text(encoding="utf-8")).items() if k != "_name_or_path"}
        if "dtype" in kept:  # else transformers would load fp16 where diffusers loads fp32
            kept["dtype"] = "float32"
        config.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    build_tokenizer(folder / "tokenizer")  # with the files of older clients, which save_pretrained leaves out
    new_scheduler().save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.0",
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"], "safety_checker": [None, None],
        "feature_extractor": [None, None], "image_encoder": [None, None], "requires_safety_checker": False,
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
