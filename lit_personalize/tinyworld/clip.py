"""The embedded metric CLIP: a stock `CLIPModel` for 64x64 pictures (Radford et al., 2021, arXiv 2103.00020).

It judges pictures and never helps to draw them: it sees held-out attributes, which the base does not.
Trained with the symmetric contrastive loss; captions that equal each other within a batch count as
matches of each other's pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from lit_personalize.tinyworld.captions import caption
from lit_personalize.tinyworld.dataset import Pictures
from lit_personalize.tinyworld.reader import reader_pictures
from lit_personalize.tinyworld.scene import Scene
from lit_personalize.tinyworld.tokenizer import build_tokenizer
from lit_personalize.tinyworld.training import Log, Stage, run_stage

WIDTH, PROJECTION, PATCH, SIDE = 128, 128, 8, 64


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """About 1.6 M parameters: two transformers of four layers."""
    shared: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 4,
                              "num_attention_heads": 4, "projection_dim": PROJECTION}  # fmt: skip
    text = {**shared, "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    vision = {**shared, "image_size": SIDE, "patch_size": PATCH}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION))


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size=SIDE, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    """Symmetric cross-entropy (Radford et al., 2021, fig. 3) with equal captions sharing the target; `[B, d]` each."""
    logits = scale.exp().clamp(max=100) * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    same = (ids[:, None] == ids[None]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def groups_alike(scenes: Sequence[Scene]) -> list[np.ndarray]:
    """Numbers of the scenes that share kind, background and the colour of what they show; groups of eight or more."""
    found: dict[tuple[str, ...], list[int]] = {}
    for number, scene in enumerate(scenes):
        color = scene.things[0].color if scene.things else scene.color
        found.setdefault((scene.kind, scene.background, color), []).append(number)
    return [np.array(group) for group in found.values() if len(group) >= 8] or [np.arange(len(scenes))]


def train_clip(
    state: Path,
    out: Path,
    *,
    seconds: float | None = None,
    steps: int = 4000,
    batch: int = 96,
    learning_rate: float = 1e-3,
    seed: int = 0,
    pictures: Pictures | None = None,
    alike: float = 0.0,
    start: Path | None = None,
    log: Log = print,
) -> CLIPModel:
    """Train on pictures of all attributes and write a stock directory to `out`, weights in fp16.

    Args:
        alike: Share of a batch that is one group of pictures alike in kind, background and colour, so that shapes,
            textures and parts must tell them apart. At random hardly any two of a batch are, and a CLIP that reads
            backgrounds and colours finds nearly every caption.
        start: Directory of a CLIP whose weights are trained on.
    """
    data = pictures or reader_pictures(state)
    tokenizer = build_tokenizer(state / "clip_tokenizer")
    torch.manual_seed(seed)
    model = CLIPModel.from_pretrained(start, dtype=torch.float32) if start else new_clip(tokenizer)
    groups = groups_alike(data.scenes)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([seed, 4, step])
        picks = rng.integers(len(data), size=batch)
        group = groups[int(rng.integers(len(groups)))]
        close = min(round(alike * batch), len(group))
        picks[:close] = rng.permutation(group)[:close]
        words = [caption(data.scenes[int(i)], rng) for i in picks]
        ids = tokenizer(words, padding="max_length", truncation=True, return_tensors="pt").input_ids
        pixels = torch.from_numpy(np.array(data.pixels[picks])).permute(0, 3, 1, 2).float() / 127.5 - 1
        out_ = model(input_ids=ids, pixel_values=pixels)
        value = contrastive_loss(out_.image_embeds, out_.text_embeds, model.logit_scale, ids)
        right = (out_.logits_per_image.argmax(1) == torch.arange(batch)).float().mean()
        return value, {"right": float(right)}

    run_stage(Stage("clip", {"clip": model}, loss, steps, learning_rate, seconds, ema=0.995), state, log)
    model.eval().half().save_pretrained(out)
    build_tokenizer(out)  # with the files of older clients
    image_processor().save_pretrained(out)
    return model.float()
