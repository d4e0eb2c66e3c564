"""Pictures for the reader: light changes that leave a picture readable, and damage that does not.

A generator's failures look like blends, shuffled parts, smears and blobs. The reader learns to call
them "unclear", so that an unreadable picture never counts as a lucky guess.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_personalize.tinyworld import vocabulary as v
from lit_personalize.tinyworld.attributes import HEADS, UNCLEAR, color_distance
from lit_personalize.tinyworld.render import Canvas, draw_background

# What a damaged picture answers: class names by head; heads left out are not taught.
Answer = dict[str, str]
Damage = Callable[[np.ndarray, Answer, np.ndarray, Answer, np.random.Generator], tuple[np.ndarray, Answer]]

_ALL_UNCLEAR: Answer = {head: UNCLEAR for head, classes in HEADS.items() if UNCLEAR in classes}
# Colours and places survive some damage, and so they are not called unclear there.
_FORM_UNCLEAR: Answer = {head: UNCLEAR for head in ("kind", "shape", "texture", "second_shape", "letter_1", "letter_2")}


def _unclear_where_different(a: Answer, b: Answer) -> Answer:
    return {h: u for h, u in _ALL_UNCLEAR.items() if h not in a or a[h] != b.get(h)} | {"kind": UNCLEAR}


def blend(x: np.ndarray, a: Answer, y: np.ndarray, b: Answer, rng: np.random.Generator) -> tuple[np.ndarray, Answer]:
    """Two pictures over each other."""
    weight = float(rng.uniform(0.38, 0.62))
    return weight * x + (1 - weight) * y, _unclear_where_different(a, b)


def splice(x: np.ndarray, a: Answer, y: np.ndarray, b: Answer, rng: np.random.Generator) -> tuple[np.ndarray, Answer]:
    """One half of each of two pictures."""
    side = x.shape[1]
    cut = int(side * rng.uniform(0.42, 0.58))
    out = x.copy()
    if rng.random() < 0.5:
        out[:, :, cut:] = y[:, :, cut:]
    else:
        out[:, cut:] = y[:, cut:]
    return out, _unclear_where_different(a, b)


def shuffle(x: np.ndarray, a: Answer, y: np.ndarray, b: Answer, rng: np.random.Generator) -> tuple[np.ndarray, Answer]:
    """The parts of one picture in another order."""
    n = int(rng.choice([2, 4, 4, 8]))
    cell = x.shape[1] // n
    order = rng.permutation(n * n)
    while (order == np.arange(n * n)).mean() > 0.3:
        order = rng.permutation(n * n)
    cells = x.reshape(3, n, cell, n, cell).transpose(1, 3, 0, 2, 4).reshape(n * n, 3, cell, cell)[order]
    out = cells.reshape(n, n, 3, cell, cell).transpose(2, 0, 3, 1, 4).reshape(x.shape)
    return out, dict(_FORM_UNCLEAR)


def wash_out(x: np.ndarray, a: Answer, y: np.ndarray, b: Answer, rng: np.random.Generator) -> tuple[np.ndarray, Answer]:
    """Heavy blur, and noise."""
    small = F.interpolate(torch.from_numpy(x)[None], size=int(rng.integers(3, 7)), mode="area")
    out = F.interpolate(small, size=x.shape[1], mode="bilinear", align_corners=False)[0].numpy()
    return out + rng.normal(0, rng.uniform(0.0, 0.15), x.shape), dict(_FORM_UNCLEAR)


def smear(x: np.ndarray, a: Answer, y: np.ndarray, b: Answer, rng: np.random.Generator) -> tuple[np.ndarray, Answer]:
    """Pulled out of shape by a strong smooth displacement."""
    field = rng.normal(0, rng.uniform(0.22, 0.4), (1, 2, 6, 6))
    out = warp(torch.from_numpy(x)[None], torch.from_numpy(field).float())[0].numpy()
    return out, {head: u for head, u in _FORM_UNCLEAR.items() if head != "kind"}


def noise(x: np.ndarray, a: Answer, y: np.ndarray, b: Answer, rng: np.random.Generator) -> tuple[np.ndarray, Answer]:
    """Smooth or rough noise and no picture."""
    n = int(rng.choice([4, 8, 16, 32, 64]))
    field = torch.from_numpy(rng.uniform(-0.2, 1.2, (1, 3, n, n))).float()
    return F.interpolate(field, size=x.shape[1], mode="bilinear")[0].numpy(), dict(_ALL_UNCLEAR)


def _ground(name: str, side: int, rng: np.random.Generator) -> np.ndarray:
    canvas = Canvas(side)
    draw_background(canvas, name, rng)
    return canvas.pixels.transpose(2, 0, 1)


def empty(x: np.ndarray, a: Answer, y: np.ndarray, b: Answer, rng: np.random.Generator) -> tuple[np.ndarray, Answer]:
    """A background on which nothing stands."""
    name = a.get("background", "white")
    answer = {**_ALL_UNCLEAR, "background": name}
    del answer["style"]
    return _ground(name, x.shape[1], rng), answer


def blob(x: np.ndarray, a: Answer, y: np.ndarray, b: Answer, rng: np.random.Generator) -> tuple[np.ndarray, Answer]:
    """A formless patch of one colour on a background: the colours can be read, the shape cannot."""
    name = a.get("background", "white")
    names = [c for c in v.ALL_COLORS if name in v.PLACES or color_distance(c, name) > 0.45]
    color = str(rng.choice(names))
    side = x.shape[1]
    axis = np.linspace(-1, 1, side)
    angle = np.arctan2(axis[:, None] - rng.uniform(-0.2, 0.2), axis[None] - rng.uniform(-0.2, 0.2))
    radius = np.hypot(axis[:, None], axis[None])
    edge = np.full_like(angle, rng.uniform(0.35, 0.6))
    for k in range(1, 6):
        edge += rng.normal(0, 0.55 / (k + 1.5)) * 0.5 * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
    alpha = np.clip((edge - radius) * side / 2, 0, 1)
    rough = F.interpolate(torch.from_numpy(rng.normal(0, 1, (1, 1, 7, 7))), size=side, mode="bicubic")[0, 0].numpy()
    alpha = np.maximum(alpha * (rough > -0.9), (rough > 1.5) & (radius < 0.8))
    out = _ground(name, side, rng) * (1 - alpha) + np.array(v.ALL_COLORS[color])[:, None, None] * alpha
    return out, {"shape": UNCLEAR, "color": color, "background": name}


DAMAGES: dict[str, Damage] = {
    "blend": blend, "splice": splice, "shuffle": shuffle, "wash_out": wash_out, "smear": smear, "noise": noise,
    "empty": empty, "blob": blob,
}  # fmt: skip
# Noise is easy to tell; formless shapes, blends and halves are what generators make.
DAMAGE_SHARES = (0.18, 0.16, 0.13, 0.12, 0.15, 0.04, 0.08, 0.14)


def warp(x: Tensor, field: Tensor) -> Tensor:
    """Move the pixels of `[B, 3, S, S]` by a coarse displacement `[B, 2, n, n]` in units of half the side."""
    side = x.shape[-1]
    shift = F.interpolate(field, size=side, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    axis = (torch.arange(side) + 0.5) * 2 / side - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)[None] + shift
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def disturb(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Small changes that a reader must bear: `[B, 3, S, S]` in [0, 1] to the same, slightly off.

    A shift of up to 2 pixels, a slight wobble, gain, softness, coarse colour as JPEG leaves it, noise.
    """
    n, side = len(x), x.shape[-1]

    def each(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.float32)).view(n, 1, 1, 1)

    wobble = rng.normal(0, 1, (n, 2, 5, 5)) * (rng.uniform(0, 0.022, (n, 1, 1, 1)) * (rng.random((n, 1, 1, 1)) < 0.5))
    shift = rng.uniform(-2, 2, (n, 2, 1, 1)) * 2 / side * (rng.random((n, 1, 1, 1)) < 0.7)
    x = warp(x, torch.from_numpy((wobble + shift).astype(np.float32)))
    soft = F.interpolate(F.avg_pool2d(x, 2), size=side, mode="bilinear", align_corners=False)
    x = x + each(rng.uniform(0, 0.9, n) * (rng.random(n) < 0.4)) * (soft - x)
    gray = x.mean(1, keepdim=True)
    chroma = F.interpolate(F.avg_pool2d(x - gray, 4), size=side, mode="bilinear", align_corners=False)
    x = x + each(rng.uniform(0, 0.5, n) * (rng.random(n) < 0.3)) * (gray + chroma - x)
    x = x * each(rng.uniform(0.93, 1.07, n)) + each(rng.uniform(-0.02, 0.02, n))
    grain = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
    return x + grain * each(rng.uniform(0, 0.035, n) * (rng.random(n) < 0.6))


def damaged(
    x: np.ndarray, a: Answer, y: np.ndarray, b: Answer, rng: np.random.Generator, name: str | None = None
) -> tuple[np.ndarray, Answer]:
    """Damage `x` (float `[3, S, S]`, true values `a`), with `y` and `b` as a second picture where one is needed."""
    name = name or str(rng.choice(list(DAMAGES), p=np.array(DAMAGE_SHARES)))
    out, answer = DAMAGES[name](x, a, y, b, rng)
    return np.clip(out, 0, 1).astype(np.float32), answer
