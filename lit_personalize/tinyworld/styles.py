"""Styles: whole-picture filters on float RGB `[H, W, 3]` in [0, 1]. Pixel scales follow the size."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray
LUMA = np.array([0.299, 0.587, 0.114])


def _blocks(pixels: Array, block: int) -> Array:
    side = pixels.shape[0] // block * block
    small = pixels[:side, :side].reshape(side // block, block, side // block, block, 3).mean((1, 3))
    out = pixels.copy()
    out[:side, :side] = np.repeat(np.repeat(small, block, 0), block, 1)
    return out


def _blur(pixels: Array, radius: int) -> Array:
    for axis in (0, 1):
        padded = np.pad(pixels, [(radius, radius) if a == axis else (0, 0) for a in range(3)], mode="edge")
        total = np.cumsum(np.insert(padded, 0, 0, axis=axis), axis=axis)
        n = pixels.shape[axis]
        width = 2 * radius + 1
        pixels = (np.take(total, np.arange(width, width + n), axis) - np.take(total, np.arange(n), axis)) / width
    return pixels


def _edges(pixels: Array) -> Array:
    """Edge strength in [0, 1], `[H, W, 1]`."""
    dx = np.abs(np.diff(pixels, axis=1, prepend=pixels[:, :1])).sum(2)
    dy = np.abs(np.diff(pixels, axis=0, prepend=pixels[:1])).sum(2)
    strength = np.clip((dx + dy) * 1.6, 0, 1)
    strength = np.maximum(strength, np.roll(strength, -1, 0))
    return np.maximum(strength, np.roll(strength, -1, 1))[..., None]


def _scale(pixels: Array) -> int:
    return max(1, pixels.shape[0] // 64)


def _pixel(p: Array, rng: np.random.Generator) -> Array:
    return _blocks(p, 4 * _scale(p))


def _watercolor(p: Array, rng: np.random.Generator) -> Array:
    soft = _blur(p, 2 * _scale(p))
    grain = _blur(rng.normal(0, 0.35, (*p.shape[:2], 1)).repeat(3, 2), 2 * _scale(p))
    return 0.12 + 0.84 * np.clip(soft + grain, 0, 1)


def _mosaic(p: Array, rng: np.random.Generator) -> Array:
    block = 8 * _scale(p)
    out = _blocks(p, block)
    line = np.arange(p.shape[0]) % block < _scale(p)
    out[line] = 0.9
    out[:, line] = 0.9
    return out * 0.5 + 0.5 * np.where(line[:, None, None] | line[None, :, None], 0.9, p)


def _halftone(p: Array, rng: np.random.Generator) -> Array:
    step = 4 * _scale(p)
    dark = 1 - _blocks(p @ LUMA[:, None] * np.ones(3), step)[..., :1]
    axis = (np.arange(p.shape[0]) % step + 0.5) / step - 0.5
    distance = np.hypot(axis[:, None], axis[None])[..., None]
    return np.where(distance < 0.72 * np.sqrt(dark), 0.08, 0.97) * np.ones(3)


STYLES: dict[str, Callable[[Array, np.random.Generator], Array]] = {
    "photo": lambda p, rng: p,
    "cartoon": lambda p, rng: p * (1 - _edges(p)),
    "pixel": _pixel,
    "watercolor": _watercolor,
    "monochrome": lambda p, rng: (p @ LUMA)[..., None] * np.ones(3),
    "sepia": lambda p, rng: (p @ LUMA)[..., None] * np.array([1.05, 0.85, 0.60]),
    "pastel": lambda p, rng: 0.58 + 0.42 * p,
    "neon": lambda p, rng: 0.05 + _edges(p) * (0.25 + 0.75 * p / np.maximum(p.max(2, keepdims=True), 0.3)),
    "mosaic": _mosaic,
    "blueprint": lambda p, rng: np.array([0.08, 0.22, 0.55]) * (1 - _edges(p)) + 0.93 * _edges(p),
    "halftone": _halftone,
    "negative": lambda p, rng: 1 - p,
    "posterized": lambda p, rng: np.round(p * 2) / 2 * np.array([1.0, 0.85, 1.0]),
}


def apply(style: str, pixels: Array, rng: np.random.Generator) -> Array:
    """Apply a named style to float RGB `[H, W, 3]`."""
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}; known: {', '.join(STYLES)}")
    return STYLES[style](pixels, rng)
