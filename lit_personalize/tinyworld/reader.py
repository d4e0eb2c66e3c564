"""The reader: a small convolutional network that names what a tinyworld picture shows.

One trunk, one linear head per attribute (`attributes.HEADS`). It sees every attribute, held-out ones
too, so that it can judge what personalization has taught; damaged pictures teach it "unclear".
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_personalize.errors import UsageError
from lit_personalize.tinyworld import vocabulary as v
from lit_personalize.tinyworld.attributes import HEADS, Reading, class_indices, targets
from lit_personalize.tinyworld.damage import damaged, disturb
from lit_personalize.tinyworld.dataset import Pictures, kept_pictures
from lit_personalize.tinyworld.render import render
from lit_personalize.tinyworld.scene import Kind, sample_scene
from lit_personalize.tinyworld.training import Log, Stage, run_stage

# Pairs, persons and signs are rare in the base's training set; here each has enough to learn from.
COUNTS: dict[Kind, int] = {"object": 30_000, "critter": 5_000, "pair": 4_000, "person": 2_000, "sign": 2_000}
STYLED_OBJECTS = 1_600
DAMAGED_SHARE = 0.25
DEFAULT_CONFIG: dict[str, Any] = {"size": 64, "widths": [24, 56, 96, 64], "hidden": 160, "dropout": 0.1}


class _Block(nn.Module):
    """Two 3x3 convolutions around a skip connection."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


def _down(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride=2, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Reader(nn.Module):
    """Reads 64x64 pictures.

    Args:
        config: `size`, four `widths`, `hidden` and `dropout`; missing keys as in `DEFAULT_CONFIG`.
    """

    def __init__(self, config: dict[str, Any] | None = None):
        super().__init__()
        self.config = {**DEFAULT_CONFIG, **(config or {})}
        a, b, c, d = self.config["widths"]
        halves = (_down(3, a, 5), _Block(a), _down(a, b), _Block(b), _down(b, c), _Block(c), _down(c, d))
        self.trunk = nn.Sequential(*halves)
        side = self.config["size"] // 16
        hidden = self.config["hidden"]
        self.neck = nn.Sequential(
            nn.Flatten(), nn.Linear(d * side * side, hidden), nn.ReLU(), nn.Dropout(self.config["dropout"])
        )
        self.heads = nn.Linear(hidden, sum(len(classes) for classes in HEADS.values()))

    def features(self, x: Tensor) -> Tensor:
        """Float `[B, 3, S, S]` in [0, 1] to `[B, hidden]`."""
        return self.neck(self.trunk(((x - 0.5) * 4).contiguous(memory_format=torch.channels_last)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Float `[B, 3, S, S]` in [0, 1] to logits `[B, classes]` by head."""
        parts = self.heads(self.features(x)).split([len(classes) for classes in HEADS.values()], dim=1)
        return dict(zip(HEADS, parts, strict=True))

    @torch.no_grad()
    def read(self, pixels: np.ndarray, batch: int = 128) -> list[Reading]:
        """Read uint8 pictures `[N, S, S, 3]`.

        Raises:
            UsageError: for another dtype or size.
        """
        size = self.config["size"]
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (size, size, 3):
            raise UsageError(
                f"the reader takes uint8 pictures [N, {size}, {size}, 3], not {pixels.dtype} {list(pixels.shape)}; "
                "resize them first"
            )
        mode = self.training
        self.eval()
        readings = []
        for start in range(0, len(pixels), batch):
            logits = self(to_unit(pixels[start : start + batch]))
            best = {head: scores.softmax(1).max(1) for head, scores in logits.items()}
            for i in range(len(pixels[start : start + batch])):
                names = {head: HEADS[head][int(top.indices[i])] for head, top in best.items()}
                readings.append(Reading(names, {head: float(top.values[i]) for head, top in best.items()}))
        self.train(mode)
        return readings

    def save(self, folder: str | Path) -> None:
        """Write `config.json` (with the heads' classes) and fp16 `model.safetensors`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {k: (t.half() if t.is_floating_point() else t).contiguous() for k, t in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = {**self.config, "heads": {head: list(classes) for head, classes in HEADS.items()}}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Reader:
        """Load a saved reader in fp32, in evaluation mode.

        Raises:
            UsageError: if it was trained for other heads than this version reads.
        """
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        heads = {head: tuple(classes) for head, classes in config.pop("heads").items()}
        if heads != HEADS:
            raise UsageError(f"the reader in {folder} knows other attributes than this version; build the world again")
        reader = cls(config)
        weights = load_file(folder / "model.safetensors")
        reader.load_state_dict({k: t.float() if t.is_floating_point() else t for k, t in weights.items()})
        return reader.eval()


def to_unit(pixels: np.ndarray) -> Tensor:
    """uint8 `[B, H, W, 3]` to float `[B, 3, H, W]` in [0, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255)


def reader_pictures(folder: Path, counts: dict[Kind, int] | None = None, seed: int = 77) -> Pictures:
    """Render pictures of all attributes and both splits once, and keep them in `folder`."""

    def draw() -> Pictures:
        drawn = []
        for index, (kind, count) in enumerate((counts or COUNTS).items()):
            rng = np.random.default_rng([seed, index])
            part = [sample_scene(rng, "all", kind) for _ in range(count)]
            if kind == "object":
                part = [replace(s, style=v.ALL_STYLES[1 + i % (len(v.ALL_STYLES) - 1)]) if i < STYLED_OBJECTS else s
                        for i, s in enumerate(part)]  # fmt: skip
            drawn += part
        return Pictures(np.stack([render(scene) for scene in drawn]), drawn)

    return kept_pictures(folder / "reader_pixels.npy", folder / "reader_scenes.jsonl", draw, mapped=True)


def training_batch(
    pictures: Pictures, answers: list[dict[str, str]], rng: np.random.Generator, batch: int
) -> tuple[Tensor, Tensor]:
    """Pictures `[B, 3, S, S]` and class indices `[B, heads]`: disturbed ones, and a share of damaged ones."""
    picks = rng.integers(len(pictures), size=batch)
    x = to_unit(pictures.pixels[picks])
    truth = [answers[i] for i in picks]
    count = round(DAMAGED_SHARE * batch)
    for row in range(count):
        other = int(rng.integers(len(pictures)))
        y = to_unit(pictures.pixels[other : other + 1])[0]
        spoilt, truth[row] = damaged(x[row].numpy(), truth[row], y.numpy(), answers[other], rng)
        x[row] = torch.from_numpy(spoilt)
    return disturb(x, rng).clamp(0, 1), torch.from_numpy(np.stack([class_indices(t) for t in truth]))


def reading_loss(logits: dict[str, Tensor], indices: Tensor) -> Tensor:
    """Cross-entropy summed over the heads that a picture answers, mean over the batch."""
    total = torch.zeros(())
    for column, scores in enumerate(logits.values()):
        total = total + F.cross_entropy(scores, indices[:, column], ignore_index=-100, reduction="sum")
    return total / len(indices)


def train_reader(
    folder: str | Path,
    *,
    seconds: float | None = None,
    steps: int = 12_000,
    batch: int = 64,
    learning_rate: float = 3e-3,
    counts: dict[Kind, int] | None = None,
    seed: int = 0,
    log: Log = print,
) -> Reader:
    """Render into `folder` (unless done) and train there, resumably; return the reader in evaluation mode."""
    folder = Path(folder)
    pictures = reader_pictures(folder, counts)
    answers = [targets(scene) for scene in pictures.scenes]
    torch.manual_seed(seed)
    reader = Reader().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([seed, 3, step])
        torch.manual_seed(seed * 7919 + step)  # dropout
        x, indices = training_batch(pictures, answers, rng, batch)
        logits = reader(x)
        known = indices != -100
        right = sum(int(((s.argmax(1) == indices[:, c]) & known[:, c]).sum()) for c, s in enumerate(logits.values()))
        return reading_loss(logits, indices), {"right": right / int(known.sum())}

    stage = Stage("reader", {"reader": reader}, loss, steps, learning_rate, seconds, ema=0.995)
    run_stage(stage, folder, log)
    return reader.eval().requires_grad_(False)
