"""The embedded metric CLIP: a stock `CLIPModel` for 64x64 pictures (Radford et al., 2021, arXiv 2103.00020).

The first of two judges pictures and never helps to draw them: it sees held-out attributes, which the base
does not. The second ranks captions for retrieval; it goes on from the first with captions as the web writes them:

    python -m lit_personalize.tinyworld.clip STATE OUT
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from lit_personalize.tinyworld.aspects import AspectHeads
from lit_personalize.tinyworld.captions import caption
from lit_personalize.tinyworld.dataset import Pictures
from lit_personalize.tinyworld.paraphrases import alt_text, facts
from lit_personalize.tinyworld.reader import reader_pictures
from lit_personalize.tinyworld.scene import Scene
from lit_personalize.tinyworld.tokenizer import build_tokenizer
from lit_personalize.tinyworld.training import Log, Stage, run_stage

WIDTH, PROJECTION, PATCH, SIDE = 128, 128, 8, 64
CONTRAST = 0.2  # beside the supervision of aspects; at full weight its gradient drowns theirs
FIRST_SCALE = math.log(1 / 0.07)  # of the logits, as in CLIP


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
    return CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, matches: Tensor) -> Tensor:
    """Symmetric cross-entropy (Radford et al., 2021, fig. 3) whose targets are shared by all that match.

    Args:
        images, texts: `[B, d]` each.
        matches: bool `[B, B]`: whether picture i (row) shows what caption j (column) says; true where i = j.
    """
    logits = scale.exp().clamp(max=100) * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    rows, columns = (m / m.sum(1, keepdim=True) for m in (matches.float(), matches.T.float()))
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, columns)) / 2


def groups_alike(scenes: Sequence[Scene]) -> list[np.ndarray]:
    """Numbers of the scenes that share kind, background and the colour of what they show; groups of eight or more."""
    found: dict[tuple[str, ...], list[int]] = {}
    for number, scene in enumerate(scenes):
        color = scene.things[0].color if scene.things else scene.color
        found.setdefault((scene.kind, scene.background, color), []).append(number)
    return [np.array(group) for group in found.values() if len(group) >= 8] or [np.arange(len(scenes))]


def pick_batch(
    count: int, groups: Sequence[np.ndarray], batch: int, alike: float, rng: np.random.Generator
) -> np.ndarray:
    """Numbers of `batch` pictures of `count`; the first ones, a share of `alike`, are of one group."""
    picks = rng.integers(count, size=batch)
    sizes = np.array([len(group) for group in groups])
    group = groups[int(rng.choice(len(groups), p=sizes / sizes.sum()))]
    close = min(round(alike * batch), len(group))
    picks[:close] = rng.permutation(group)[:close]
    return picks


def pixel_values(data: Pictures, picks: np.ndarray) -> Tensor:
    """Float `[B, 3, 64, 64]` in [-1, 1], as `image_processor` gives it."""
    return torch.from_numpy(np.array(data.pixels[picks])).permute(0, 3, 1, 2).float() / 127.5 - 1


def save_clip(model: CLIPModel, out: Path) -> None:
    """Write a stock directory, weights in fp16."""
    model.eval().half().save_pretrained(out)
    build_tokenizer(out)  # with the files of older clients
    image_processor().save_pretrained(out)


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
    alt_texts: bool = False,
    start: Path | None = None,
    log: Log = print,
) -> CLIPModel:
    """Train on pictures of all attributes and write a stock directory to `out`, weights in fp16.

    Args:
        alike: Share of a batch that is one group of pictures alike in kind, background and colour, so that shapes,
            textures and parts must tell them apart. At random hardly any two of a batch are, and a CLIP that reads
            backgrounds and colours finds nearly every caption.
        alt_texts: Captions of `paraphrases.alt_text`, each matching every picture of the batch of which it is true,
            and heads that read what they say (`aspects`); otherwise captions of the grammar, matching where equal.
        start: Directory of a CLIP whose weights are trained on.
    """
    data = pictures or reader_pictures(state)
    tokenizer = build_tokenizer(state / "clip_tokenizer")
    torch.manual_seed(seed)
    model = CLIPModel.from_pretrained(start, dtype=torch.float32) if start else new_clip(tokenizer)
    if alt_texts:
        model.logit_scale.data.fill_(FIRST_SCALE)
    groups = groups_alike(data.scenes)
    heads = AspectHeads(model.config.projection_dim)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([seed, 4, step])
        picks = pick_batch(len(data), groups, batch, alike, rng)
        scenes = [data.scenes[int(i)] for i in picks]
        if alt_texts:
            words, said = zip(*(alt_text(scene, rng) for scene in scenes), strict=True)
            matches = torch.tensor([[claims <= true for claims in said] for true in map(facts, scenes)])
        else:
            words = tuple(caption(scene, rng) for scene in scenes)
            matches = torch.tensor([[mine == other for other in words] for mine in words])
        ids = tokenizer(list(words), padding="longest", truncation=True, return_tensors="pt").input_ids
        out_ = model(input_ids=ids, pixel_values=pixel_values(data, picks))
        value = contrastive_loss(out_.image_embeds, out_.text_embeds, model.logit_scale, matches)
        right = matches[torch.arange(batch), out_.logits_per_image.argmax(1)].float().mean()
        if not alt_texts:
            return value, {"right": float(right)}
        seen, of_pictures = heads.loss(out_.image_embeds, [facts(scene) for scene in scenes], whole=True)
        read, of_captions = heads.loss(out_.text_embeds, said, whole=False)
        shapes = {"shapes seen": of_pictures.get("shape", 0.0), "shapes read": of_captions.get("shape", 0.0)}
        return CONTRAST * value + seen + read, {"right": float(right), **shapes}

    modules: dict[str, nn.Module] = {"clip": model, "heads": heads} if alt_texts else {"clip": model}
    run_stage(Stage("clip", modules, loss, steps, learning_rate, seconds, ema=0.995), state, log)
    save_clip(model, out)
    return model.float()


def main(arguments: list[str] | None = None) -> int:
    from lit_personalize.tinyworld.build import committed_weights, seconds_of

    parser = argparse.ArgumentParser(description="Train the CLIP that ranks captions for retrieval; resumable.")
    parser.add_argument("state", type=Path, help="folder of the rendered pictures and of the unfinished training")
    parser.add_argument("out", type=Path, help="folder of the finished CLIP")
    parser.add_argument("--budget", default="25m", help="wall-clock time such as 25m")
    options = parser.parse_args(arguments)
    seconds = seconds_of(options.budget)
    train_clip(options.state, options.out, seconds=seconds, learning_rate=1e-3, alike=0.5, alt_texts=True,
               start=committed_weights() / "clip", log=functools.partial(print, flush=True))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
