"""A base of Stable Diffusion 1.5's size with random weights, in stock layout: for benchmarks, where none is at hand.

    python benchmarks/full_base.py FOLDER [--dtype bfloat16]

Times and memory of a step do not depend on what the weights are. The tokenizer knows a few words only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

TEXT = {
    "vocab_size": 49_408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
}  # fmt: skip
VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "sample_size": 512,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
"""Text encoder and VAE, as far as the libraries' defaults differ."""


def unet_of_sd15() -> dict[str, Any]:
    """The UNet, which `kernels/benchmarks/counts.py` knows."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels/benchmarks"))
    from counts import SIZES

    return dict(SIZES["sd15"])


def write_base(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    unet: Mapping[str, Any],
    vae: Mapping[str, Any] = VAE,
    text: Mapping[str, Any] = TEXT,
) -> None:
    """Write a base whose parts have these configurations, drawn on `device`."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from lit_personalize.backbones.tiny import write_tiny_base

    write_tiny_base(folder)  # for tokenizer and noise schedule: the parts are replaced
    torch.manual_seed(0)
    parts: dict[str, Callable[[], Any]] = {
        "unet": lambda: UNet2DConditionModel(**unet),
        "vae": lambda: AutoencoderKL(**vae),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**text)),
    }
    for name, build in parts.items():
        with device:
            part = build()
        part.to(dtype).save_pretrained(folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_base(options.folder, getattr(torch, options.dtype), device, unet_of_sd15())


if __name__ == "__main__":
    main()
