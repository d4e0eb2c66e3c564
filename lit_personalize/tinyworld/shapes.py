"""Signed distances of tinyworld's shapes: negative inside, positive outside, in units of the radius.

Every function takes local coordinates `x` (right) and `y` (down) as arrays of one shape, with the
shape's radius equal to 1, and returns an array of the same shape. Polygons use the exact distance
(Quilez, "2D distance functions"); composed shapes use minimum (union) and maximum (intersection).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray
Distance = Callable[[Array, Array], Array]


def disc(x: Array, y: Array, cx: float = 0.0, cy: float = 0.0, r: float = 1.0) -> Array:
    return np.hypot(x - cx, y - cy) - r


def ellipse(x: Array, y: Array, cx: float, cy: float, rx: float, ry: float) -> Array:
    """Approximate distance: exact on the axes, good near the edge."""
    px, py = (x - cx) / rx, (y - cy) / ry
    k = np.hypot(px, py)
    gradient = np.hypot(px / rx, py / ry)
    return k * (k - 1.0) / np.maximum(gradient, 1e-6)


def box(x: Array, y: Array, cx: float, cy: float, hx: float, hy: float, corner: float = 0.0) -> Array:
    dx, dy = np.abs(x - cx) - hx + corner, np.abs(y - cy) - hy + corner
    outside = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0))
    return outside + np.minimum(np.maximum(dx, dy), 0) - corner


def polygon(x: Array, y: Array, points: list[tuple[float, float]]) -> Array:
    """Exact signed distance to a simple polygon."""
    vertices = np.array(points)
    best = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    for a, b in zip(vertices, np.roll(vertices, -1, axis=0), strict=True):
        ex, ey = b - a
        wx, wy = x - a[0], y - a[1]
        t = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        best = np.minimum(best, (wx - t * ex) ** 2 + (wy - t * ey) ** 2)
        crosses = (a[1] > y) != (b[1] > y)
        if ey != 0:
            inside ^= crosses & (x < ex * (y - a[1]) / ey + a[0])
    return np.where(inside, -1.0, 1.0) * np.sqrt(best)


def regular(n: int, r: float = 1.0, turn: float = 0.0) -> list[tuple[float, float]]:
    angles = [turn - np.pi / 2 + 2 * np.pi * k / n for k in range(n)]
    return [(r * float(np.cos(a)), r * float(np.sin(a))) for a in angles]


def star_points(n: int, inner: float, outer: float = 1.0) -> list[tuple[float, float]]:
    points = []
    for k in range(2 * n):
        r = outer if k % 2 == 0 else inner
        a = -np.pi / 2 + np.pi * k / n
        points.append((r * float(np.cos(a)), r * float(np.sin(a))))
    return points


def heart(x: Array, y: Array) -> Array:
    lobes = np.minimum(disc(x, y, -0.45, -0.28, 0.53), disc(x, y, 0.45, -0.28, 0.53))
    tip = polygon(x, y, [(-0.93, -0.05), (0.0, -0.45), (0.93, -0.05), (0.0, 0.98)])
    return np.minimum(lobes, tip)


def crescent(x: Array, y: Array) -> Array:
    return np.maximum(disc(x, y, 0, 0, 0.98), -disc(x, y, 0.46, -0.12, 0.78))


def drop(x: Array, y: Array) -> Array:
    return np.minimum(disc(x, y, 0, 0.35, 0.62), polygon(x, y, [(0, -1.05), (0.58, 0.15), (-0.58, 0.15)]))


def clover(x: Array, y: Array) -> Array:
    leaves = np.minimum(disc(x, y, 0, -0.48, 0.46), disc(x, y, -0.46, 0.16, 0.46))
    leaves = np.minimum(leaves, disc(x, y, 0.46, 0.16, 0.46))
    return np.minimum(leaves, box(x, y, 0, 0.6, 0.12, 0.42))


def gear(x: Array, y: Array) -> Array:
    teeth = np.full(x.shape, np.inf)
    for k in range(4):
        c, s = np.cos(np.pi * k / 4), np.sin(np.pi * k / 4)
        teeth = np.minimum(teeth, box(c * x + s * y, c * y - s * x, 0, 0, 0.17, 1.0))
    return np.maximum(np.minimum(disc(x, y, 0, 0, 0.74), teeth), -disc(x, y, 0, 0, 0.3))


DISTANCES: dict[str, Distance] = {
    "circle": lambda x, y: disc(x, y, 0, 0, 0.95),
    "square": lambda x, y: box(x, y, 0, 0, 0.82, 0.82),
    "triangle": lambda x, y: polygon(x, y, [(0, -0.95), (0.98, 0.75), (-0.98, 0.75)]),
    "star": lambda x, y: polygon(x, y + 0.05, star_points(5, 0.42, 1.08)),
    "heart": heart,
    "ring": lambda x, y: np.abs(disc(x, y, 0, 0, 0.72)) - 0.24,
    "cross": lambda x, y: np.minimum(box(x, y, 0, 0, 0.95, 0.31), box(x, y, 0, 0, 0.31, 0.95)),
    "diamond": lambda x, y: polygon(x, y, [(0, -1.05), (0.7, 0), (0, 1.05), (-0.7, 0)]),
    "hexagon": lambda x, y: polygon(x, y, regular(6, 0.98, np.pi / 6)),
    "crescent": crescent,
    "arrow": lambda x, y: np.minimum(
        box(x, y, -0.4, 0, 0.58, 0.24), polygon(x, y, [(1.0, 0), (0.05, -0.8), (0.05, 0.8)])
    ),
    "oval": lambda x, y: ellipse(x, y, 0, 0, 1.05, 0.58),
    "gear": gear,
    "clover": clover,
    "bolt": lambda x, y: polygon(
        x, y, [(0.25, -1.0), (-0.6, 0.15), (-0.05, 0.15), (-0.25, 1.0), (0.6, -0.2), (0.05, -0.2)]
    ),
    "drop": drop,
    "house": lambda x, y: np.minimum(
        box(x, y, 0, 0.35, 0.66, 0.55), polygon(x, y, [(0, -0.95), (0.98, -0.08), (-0.98, -0.08)])
    ),
    "hourglass": lambda x, y: np.minimum(
        polygon(x, y, [(-0.75, -0.92), (0.75, -0.92), (0, 0.12)]),
        polygon(x, y, [(-0.75, 0.92), (0.75, 0.92), (0, -0.12)]),
    ),
}

# 5x7 dot-matrix letters, one string of rows per glyph.
GLYPH_ROWS: dict[str, tuple[str, ...]] = {
    "A": (".###.", "#...#", "#...#", "#####", "#...#", "#...#", "#...#"),
    "C": (".####", "#....", "#....", "#....", "#....", "#....", ".####"),
    "E": ("#####", "#....", "#....", "####.", "#....", "#....", "#####"),
    "H": ("#...#", "#...#", "#...#", "#####", "#...#", "#...#", "#...#"),
    "K": ("#...#", "#..#.", "#.#..", "##...", "#.#..", "#..#.", "#...#"),
    "L": ("#....", "#....", "#....", "#....", "#....", "#....", "#####"),
    "O": (".###.", "#...#", "#...#", "#...#", "#...#", "#...#", ".###."),
    "T": ("#####", "..#..", "..#..", "..#..", "..#..", "..#..", "..#.."),
    "X": ("#...#", "#...#", ".#.#.", "..#..", ".#.#.", "#...#", "#...#"),
    "Z": ("#####", "....#", "...#.", "..#..", ".#...", "#....", "#####"),
}
