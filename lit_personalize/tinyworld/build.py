"""Make the embedded world from nothing: pictures, VAE, reader, CLIP, text-to-image base, card.

One resumable command. Each stage keeps its state in `<out>/.build`; a second call goes on where the
first was stopped, and finished stages are not repeated. The budget is wall-clock time over all
stages; each gets a fixed share of it and cools its learning rate down as its share runs out.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from lit_personalize.errors import UsageError
from lit_personalize.tinyworld.dataset import Pictures, kept_pictures, sample_pictures
from lit_personalize.tinyworld.training import Log

VERSION = "tinyworld-v1"
SHARES = {"vae": 0.15, "reader": 0.15, "clip": 0.10, "base": 0.55}  # the rest renders and scores


@dataclass(frozen=True)
class BuildOptions:
    """How large a world to make; the defaults are those of the committed weights."""

    pictures: int = 30_000
    """Training pictures of the base."""
    seed: int = 0
    processes: int = 2
    vae_steps: int = 6_000
    base_steps: int = 12_000
    batch: int = 32


def seconds_of(budget: str) -> float:
    """Seconds in a duration such as "90s", "150m" or "2.5h"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", budget.strip())
    if not match:
        raise UsageError(f"budget {budget!r} is not a duration; write for example 90s, 150m or 2.5h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def training_pictures(folder: Path, options: BuildOptions) -> Pictures:
    """Render the base's training set once and keep it in `folder`."""

    def draw() -> Pictures:
        return sample_pictures(options.pictures, options.seed, processes=options.processes)

    return kept_pictures(folder / "pictures.npy", folder / "scenes.jsonl", draw)


def build(
    out: Path,
    budget: str | None = None,
    options: BuildOptions | None = None,
    start: Path | None = None,
    log: Log = print,
) -> Path:
    """Train everything into `out` (`base/`, `clip/`, `reader/`, `card.json`) and return it.

    Args:
        budget: Wall-clock limit such as "150m"; None trains the full number of steps.
        start: An earlier world: its VAE, reader and CLIP are kept, UNet and text encoder train on.
    """
    from lit_personalize.tinyworld.autoencoder import encode_pictures, train_autoencoder
    from lit_personalize.tinyworld.card import write_card
    from lit_personalize.tinyworld.clip import train_clip
    from lit_personalize.tinyworld.diffusion import save_pipeline, train_diffusion
    from lit_personalize.tinyworld.reader import train_reader
    from lit_personalize.tinyworld.tokenizer import build_tokenizer

    options = options or BuildOptions()
    total = seconds_of(budget) if budget else None
    seconds = {name: total * share if total else None for name, share in SHARES.items()}
    state = out / ".build"
    log(f"{VERSION}: rendering {options.pictures} pictures")
    pictures = training_pictures(state, options)
    log("VAE: random crops of all pictures")
    if start is not None:
        vae = AutoencoderKL.from_pretrained(start / "base" / "vae", local_files_only=True, torch_dtype=torch.float32)
        for part in ("reader", "clip"):
            if (start / part).is_dir() and not (out / part).exists():
                shutil.copytree(start / part, out / part)
    else:
        more = sample_pictures(options.pictures // 10, options.seed + 7, population="all", processes=options.processes)
        vae = train_autoencoder(
            np.concatenate([pictures.pixels, more.pixels]), state, steps=options.vae_steps, seconds=seconds["vae"],
            seed=options.seed, log=log,
        )  # fmt: skip
    tokenizer = build_tokenizer(state / "tokenizer")
    if not (out / "reader").exists():
        train_reader(state, seconds=seconds["reader"], log=log).save(out / "reader")
    if not (out / "clip").exists():
        train_clip(state, out / "clip", seconds=seconds["clip"], log=log)
    unet, text_encoder = train_diffusion(
        encode_pictures(vae, pictures.pixels), pictures.scenes, vae.config.scaling_factor, tokenizer, state,
        steps=options.base_steps, batch=options.batch, seconds=seconds["base"], seed=options.seed, start=start, log=log,
    )  # fmt: skip
    save_pipeline(out / "base", unet, text_encoder, vae)
    card = write_card(out, log=log)
    log(json.dumps(card, indent=2))
    return out


def committed_weights() -> Path:
    """The folder of the weights that ship with the package."""
    return Path(__file__).parent / "weights"
