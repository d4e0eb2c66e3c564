"""Tiny randomly initialised pipelines of every family, in stock diffusers layout.

For tests and dry runs: the code path of a real base at a millionth of its cost. The pictures are noise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch

Family = Literal["sd1", "sd2", "sd2-v", "sdxl"]
WIDTHS = (32, 48)
"""Of the text encoders; the second is SDXL's."""
WORDS = tuple("a an the photo picture of cat dog toy red blue on beach in style ktn pll".split())


def write_tiny_base(folder: Path, family: Family = "sd1", seed: int = 0) -> Path:
    """Write a random pipeline of `family` (about 0.2 M parameters, 32x32 pictures) into `folder`."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        xl = family == "sdxl"
        tokenizer = _tiny_tokenizer(folder / "tokenizer")
        shape: dict[str, Any] = {
            "vocab_size": len(tokenizer), "hidden_size": WIDTHS[0], "intermediate_size": 37, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 77, "projection_dim": 32,
            "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
        }  # fmt: skip
        CLIPTextModel(CLIPTextConfig(**shape)).save_pretrained(folder / "text_encoder")
        if xl:
            _tiny_tokenizer(folder / "tokenizer_2")
            wider = {**shape, "hidden_size": WIDTHS[1]}  # wider, as SDXL's: neither can pass for the other
            CLIPTextModelWithProjection(CLIPTextConfig(**wider)).save_pretrained(folder / "text_encoder_2")
        extra: dict[str, Any] = {}
        if xl:
            extra = {
                "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 6 * 8 + 32, "transformer_layers_per_block": (1, 2),
            }  # fmt: skip
        UNet2DConditionModel(
            sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=sum(WIDTHS) if xl else WIDTHS[0], attention_head_dim=(2, 4) if family != "sd1" else 4,
            use_linear_projection=family != "sd1", norm_num_groups=16, **extra,
        ).save_pretrained(folder / "unet")  # fmt: skip
        AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=4, sample_size=32, block_out_channels=(16, 32),
            layers_per_block=1, norm_num_groups=8, down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.13025 if xl else 0.18215,
        ).save_pretrained(folder / "vae")  # fmt: skip
        DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            prediction_type="v_prediction" if family == "sd2-v" else "epsilon",
        ).save_pretrained(folder / "scheduler")  # fmt: skip
    listed: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline",
        "_diffusers_version": "0.42.0",
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    }  # fmt: skip
    if xl:
        listed["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        listed["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
        listed["force_zeros_for_empty_prompt"] = False
    else:
        listed.update({"safety_checker": [None, None], "feature_extractor": [None, None]})
        listed["requires_safety_checker"] = False
    (folder / "model_index.json").write_text(json.dumps(listed, indent=2), encoding="utf-8")
    return folder


def _tiny_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer over letters and `WORDS`; everything else falls back to letters."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(33, 127)]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
                vocabulary.append("".join(pair))
            parts = ["".join(pair), *parts[2:]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(dict.fromkeys(vocabulary))}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def write_tiny_clip(folder: Path) -> Path:
    """Write a random `CLIPModel` for 32x32 pictures with the tokenizer of a tiny base, and return `folder`."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(write_tiny_base(folder / "base") / "tokenizer")
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": 0, "pad_token_id": 1}
    text = {**layers, **tokens, "eos_token_id": tokenizer.eos_token_id}
    vision = {**layers, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder
