"""The picture tower of the retrieval CLIP alone, its caption tower locked (LiT, Zhai et al., 2022, arXiv 2111.07991).

A picture is drawn to the embedding of the caption that says all it shows. Searches by text stay what they were, and
a picture asks what its caption would:

    python -m lit_personalize.tinyworld.clip_pictures STATE START OUT
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel

from lit_personalize.metrics.caption_encoder import CaptionEncoder
from lit_personalize.tinyworld.aspects import AspectHeads
from lit_personalize.tinyworld.build import committed_weights, seconds_of
from lit_personalize.tinyworld.captions import caption
from lit_personalize.tinyworld.clip import contrastive_loss, groups_alike, pick_batch, pixel_values, save_clip
from lit_personalize.tinyworld.dataset import Pictures
from lit_personalize.tinyworld.paraphrases import facts
from lit_personalize.tinyworld.reader import Reader, reader_pictures
from lit_personalize.tinyworld.training import Log, Stage, run_stage

ALIKE = 0.5  # of a batch; else backgrounds and colours tell nearly all of its captions apart


def train_pictures(
    state: Path,
    start: Path,
    out: Path,
    *,
    seconds: float | None = None,
    steps: int = 12_000,
    batch: int = 96,
    learning_rate: float = 1e-3,
    seed: int = 0,
    pictures: Pictures | None = None,
    compiled: bool = False,
    log: Log = print,
) -> CLIPModel:
    """Train the picture tower and projection of the CLIP in `start`; all else goes to `out` as it is.

    The loss is the sum of the distance to the caption (1 - cosine), the contrastive loss against the captions of the
    batch, the aspects read by heads that also read the captions (`aspects`), and the distance of the patches to the
    features of a convolutional network that knows shapes, the reader: its map has one place per patch. Without
    the last two the tower learns colours and backgrounds long before shapes.

    Args:
        compiled: Whether the tower is compiled: about a quarter faster, after half a minute.
    """
    data = pictures or reader_pictures(state)
    torch.manual_seed(seed)
    model = CLIPModel.from_pretrained(start, dtype=torch.float32).requires_grad_(False)
    for part in (model.vision_model, model.visual_projection):
        part.requires_grad_(True)
    if compiled:
        model.vision_model.compile()
    words = [caption(scene) for scene in data.scenes]
    encoder = CaptionEncoder(start)
    log(f"captions of {len(words)} pictures")
    targets = torch.cat([torch.from_numpy(encoder.texts(words[i : i + 256])) for i in range(0, len(words), 256)])
    groups, heads = groups_alike(data.scenes), AspectHeads(model.config.projection_dim)
    teacher = Reader.load(committed_weights() / "reader").requires_grad_(False)
    to_teacher = nn.Linear(model.config.vision_config.hidden_size, teacher.config["widths"][2])

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        picks = pick_batch(len(data), groups, batch, ALIKE, np.random.default_rng([seed, 5, step]))
        told, wanted = [facts(data.scenes[int(i)]) for i in picks], targets[picks]
        pixels = pixel_values(data, picks)
        out_ = model.vision_model(pixel_values=pixels)
        got = model.visual_projection(out_.pooler_output)
        local = F.mse_loss(to_teacher(out_.last_hidden_state[:, 1:]), patch_features(teacher, pixels))
        said = np.array([words[int(i)] for i in picks])
        matches = torch.from_numpy(said[:, None] == said)
        near = F.cosine_similarity(got, wanted).mean()
        seen, right = heads.loss(got, told, whole=True)
        read, _ = heads.loss(wanted, told, whole=True)
        value = 1 - near + contrastive_loss(got, wanted, model.logit_scale, matches) + seen + read + local
        return value, {
            "cosine": float(near.detach()),
            "local": float(local.detach()),
            "shapes seen": right.get("shape", 0.0),
        }

    modules: dict[str, nn.Module] = {"vision": model.vision_model, "projection": model.visual_projection,
                                     "heads": heads, "to_teacher": to_teacher}  # fmt: skip
    run_stage(Stage("clip_pictures", modules, loss, steps, learning_rate, seconds, ema=0.995), state, log)
    save_clip(model, out)
    return model.float()


@torch.no_grad()
def patch_features(reader: Reader, pixels: Tensor) -> Tensor:
    """Pictures `[B, 3, 64, 64]` in [-1, 1] to the reader's map of 8 x 8 places, `[B, 64, C]`, standardised."""
    features = reader.trunk[:6](2 * pixels)  # before the fourth halving
    features = features.flatten(2).transpose(1, 2)
    return (features - features.mean((0, 1))) / features.std((0, 1)).clamp_min(1e-3)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the picture tower of the retrieval CLIP; resumable.")
    parser.add_argument("state", type=Path, help="folder of the rendered pictures and of the unfinished training")
    parser.add_argument("start", type=Path, help="folder of the CLIP whose caption tower stays")
    parser.add_argument("out", type=Path, help="folder of the finished CLIP")
    parser.add_argument("--budget", default="60m", help="wall-clock time such as 60m")
    options = parser.parse_args(arguments)
    train_pictures(options.state, options.start, options.out, seconds=seconds_of(options.budget), compiled=True,
                   log=functools.partial(print, flush=True))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
