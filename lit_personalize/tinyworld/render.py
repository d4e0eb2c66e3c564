"""Draw a `Scene`: uint8 RGB pictures of any square size, the same on every machine.

The picture is composed in float RGB from signed distances (`shapes.py`) at twice the asked size and
averaged down, then passed through its style. All small variations come from `Scene.seed`.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from lit_personalize.tinyworld import styles
from lit_personalize.tinyworld import vocabulary as v
from lit_personalize.tinyworld.scene import Scene, Thing
from lit_personalize.tinyworld.shapes import DISTANCES, GLYPH_ROWS, Array, box, disc, ellipse, polygon

RGB = tuple[float, float, float]


class Canvas:
    """A square float picture with coordinates `u`, `w` in [0, 1] (right, down)."""

    def __init__(self, size: int):
        self.size = size
        axis = ((np.arange(size) + 0.5) / size).astype(np.float32)
        self.u, self.w = np.meshgrid(axis, axis)
        self.pixels = np.ones((size, size, 3), dtype=np.float32)

    def fill(self, distance: Array, color: RGB | Array, unit: float = 1.0) -> None:
        """Paint where `distance * unit` is negative, with an edge one pixel wide."""
        alpha = np.clip(0.5 - distance * np.float32(unit * self.size), 0, 1).astype(np.float32)
        touched = alpha > 0
        weight = alpha[touched][:, None]
        paint = np.asarray(color, dtype=np.float32)
        paint = paint[touched] if paint.ndim == 3 else paint
        self.pixels[touched] = self.pixels[touched] * (1 - weight) + paint * weight


def _mix(a: RGB, b: RGB, t: float) -> RGB:
    return tuple(float(x + (y - x) * t) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def texture_colors(texture: str, first: RGB, second: RGB, x: Array, y: Array, distance: Array) -> Array:
    """Colour of each pixel of a textured shape, `[H, W, 3]`, in the shape's own coordinates."""
    if texture == "striped":
        mask = np.sin(y * np.pi / 0.28) > 0.25
    elif texture == "dotted":
        gx, gy = np.mod(x / 0.46 + 0.5, 1) - 0.5, np.mod(y / 0.46 + 0.5, 1) - 0.5
        mask = np.hypot(gx, gy) < 0.27
    elif texture == "checkered":
        mask = (np.floor(x / 0.36) + np.floor(y / 0.36)) % 2 == 0
    elif texture == "zigzag":
        mask = np.sin((x + 0.9 * np.abs(np.mod(y / 0.5, 2) - 1) * 0.5) * np.pi / 0.26) > 0.2
    elif texture == "framed":
        mask = (distance > -0.2) | ((distance < -0.36) & (distance > -0.5))
    elif texture == "halved":
        mask = x > 0
    else:
        mask = np.zeros(x.shape, dtype=bool)
    return np.where(mask[..., None], np.asarray(second), np.asarray(first))


def draw_thing(canvas: Canvas, thing: Thing) -> None:
    dx, dy = (canvas.u - thing.x) / thing.radius, (canvas.w - thing.y) / thing.radius
    c, s = np.cos(thing.angle), np.sin(thing.angle)
    x, y = c * dx + s * dy, c * dy - s * dx
    distance = DISTANCES[thing.shape](x, y)
    colors = texture_colors(
        thing.texture, v.ALL_COLORS[thing.color], v.ALL_COLORS[thing.second_color], x, y, distance
    )
    canvas.fill(distance, colors, unit=thing.radius)


def draw_background(canvas: Canvas, name: str, rng: np.random.Generator) -> None:
    """Fill with a plain colour, or draw a place: two tones and a few marks each."""
    u, w = canvas.u, canvas.w
    if name in v.ALL_COLORS:
        shade = 1.0 + 0.06 * float(rng.uniform(-1, 1))
        canvas.pixels[:] = np.clip(np.array(v.ALL_COLORS[name]) * shade, 0, 1)
        return
    horizon = 0.62 + 0.06 * float(rng.uniform(-1, 1))
    shift = float(rng.uniform(0, 1))

    def layers(sky: RGB, ground: RGB) -> None:
        canvas.pixels[:] = sky
        canvas.fill(horizon - w, ground)

    if name == "beach":
        layers((0.55, 0.82, 0.97), (0.95, 0.86, 0.60))
        canvas.fill(np.abs(w - horizon + 0.06) - 0.06, (0.15, 0.55, 0.80))
        canvas.fill(disc(u, w, 0.1 + 0.8 * shift, 0.13, 0.08), (1.0, 0.93, 0.35))
    elif name == "forest":
        layers((0.70, 0.86, 0.78), (0.16, 0.36, 0.15))
        for k in range(5):
            cx, top = (k + 0.5 * shift) / 4.4, 0.08 + 0.1 * ((k * 7) % 3) / 2
            canvas.fill(polygon(u, w, [(cx, top), (cx + 0.15, horizon), (cx - 0.15, horizon)]), (0.08, 0.42, 0.20))
    elif name == "snow":
        layers((0.72, 0.80, 0.90), (0.97, 0.98, 1.0))
        for _ in range(9):
            canvas.fill(disc(u, w, float(rng.uniform()), float(rng.uniform(0, horizon)), 0.018), (1, 1, 1))
    elif name == "night":
        layers((0.05, 0.05, 0.20), (0.10, 0.13, 0.16))
        for _ in range(9):
            canvas.fill(disc(u, w, float(rng.uniform()), float(rng.uniform(0, horizon)), 0.014), (1.0, 1.0, 0.85))
        canvas.fill(disc(u, w, 0.12 + 0.76 * shift, 0.14, 0.08), (0.98, 0.96, 0.80))
    elif name == "desert":
        layers((0.98, 0.78, 0.48), (0.86, 0.55, 0.25))
        for cx in (0.12 + 0.1 * shift, 0.88):
            canvas.fill(box(u, w, cx, horizon - 0.05, 0.022, 0.13), (0.16, 0.45, 0.20))
            canvas.fill(box(u, w, cx, horizon - 0.06, 0.07, 0.018), (0.16, 0.45, 0.20))
    elif name == "city":
        layers((0.80, 0.80, 0.86), (0.32, 0.32, 0.34))
        for k in range(6):
            top = 0.08 + 0.36 * ((k * 5 + int(6 * shift)) % 6) / 6
            wall = (0.40 + 0.08 * (k % 3), 0.40 + 0.08 * (k % 3), 0.50 + 0.08 * (k % 3))
            canvas.fill(box(u, w, (k + 0.5) / 6, (top + horizon) / 2, 0.072, (horizon - top) / 2), wall)
    elif name == "meadow":
        layers((0.62, 0.86, 0.98), (0.42, 0.78, 0.26))
        for k in range(10):
            px, py = float(rng.uniform()), float(rng.uniform(horizon + 0.05, 1))
            canvas.fill(disc(u, w, px, py, 0.02), (1.0, 0.95, 0.5) if k % 2 else (0.98, 0.6, 0.75))
    elif name == "sea":
        layers((0.66, 0.90, 0.96), (0.10, 0.42, 0.66))
        for k in range(3):
            wave = w - (horizon + 0.08 + 0.11 * k) + 0.015 * np.sin(2 * np.pi * (4 * u + shift + 0.3 * k))
            canvas.fill(np.abs(wave) - 0.012, (0.75, 0.92, 0.98))
    else:
        raise ValueError(f"unknown background {name!r}; known: {', '.join((*v.COLORS, *v.PLACES))}")


def draw_critter(canvas: Canvas, scene: Scene) -> None:
    """A round-eyed animal; `scene.body` gives its proportions, `scene.attributes` its parts."""
    width, height, squareness, eye_size, eye_distance, ear, hue = scene.body
    base = v.ALL_COLORS[scene.color]
    body = _mix(base, (1.0, 1.0, 1.0) if hue > 0.5 else (0.0, 0.0, 0.0), 0.22 * abs(hue - 0.5))
    dark, light = _mix(body, (0, 0, 0), 0.45), _mix(body, (1, 1, 1), 0.55)
    u, w = canvas.u, canvas.w
    rx, ry = 0.19 + 0.07 * width, 0.21 + 0.06 * height
    cx, cy = 0.5, 0.58
    has = scene.attributes.__contains__
    if has("wings"):
        for side in (-1, 1):
            px = cx + side * (rx + 0.10)
            canvas.fill(ellipse(u + side * 0.35 * (w - cy), w, px, cy - 0.02, 0.13, 0.10), light)
            canvas.fill(np.abs(ellipse(u + side * 0.35 * (w - cy), w, px, cy - 0.02, 0.13, 0.10)) - 0.008, dark)
    if has("tail"):
        arc = np.abs(disc(u, w, cx + rx + 0.06, cy + ry - 0.12, 0.11)) - 0.028
        canvas.fill(np.maximum(arc, cx + rx * 0.7 - u), dark)
    if has("horns"):
        for side in (-1, 1):
            hx, hy = cx + side * rx * 0.6, cy - ry * 0.72
            horn = polygon(u, w, [(hx - 0.055, hy), (hx + 0.055, hy), (hx + side * 0.07, hy - 0.19)])
            canvas.fill(horn, (0.96, 0.92, 0.78))
    if has("antennae"):
        for side in (-1, 1):
            ax, ay = cx + side * 0.055, cy - ry
            canvas.fill(box(u - side * 0.25 * (ay - w), w, ax, ay - 0.07, 0.012, 0.09), (0.07, 0.07, 0.07))
            canvas.fill(disc(u, w, ax + side * 0.04, ay - 0.16, 0.034), (0.87, 0.13, 0.13))
    for side in (-1, 1):  # ears
        canvas.fill(ellipse(u, w, cx + side * rx * 0.92, cy - ry * 0.62, 0.055, 0.05 + 0.09 * ear), dark)
        canvas.fill(box(u, w, cx + side * rx * 0.5, cy + ry + 0.01, 0.05, 0.04, 0.03), dark)  # feet
    round_body = ellipse(u, w, cx, cy, rx, ry)
    square_body = box(u, w, cx, cy, rx * 0.92, ry * 0.92, 0.08)
    body_distance = (1 - squareness) * round_body + squareness * square_body
    canvas.fill(body_distance, body)
    if has("spots"):
        for px, py in ((-0.55, 0.15), (0.5, 0.4), (-0.25, 0.68), (0.62, -0.05), (0.12, 0.42), (-0.62, 0.52)):
            spot = disc(u, w, cx + px * rx, cy + py * ry, 0.042)
            canvas.fill(np.maximum(spot, body_distance), dark if sum(body) > 0.9 else light)
    gap, radius = 0.055 + 0.05 * eye_distance, 0.032 + 0.028 * eye_size
    ey = cy - ry * 0.32
    for side in (-1, 1):
        canvas.fill(disc(u, w, cx + side * gap, ey, radius), (1, 1, 1))
        canvas.fill(disc(u, w, cx + side * gap, ey, radius * 0.5), (0.05, 0.05, 0.05))
    if has("glasses"):
        for side in (-1, 1):
            canvas.fill(np.abs(disc(u, w, cx + side * max(gap, 0.075), ey, 0.073)) - 0.014, (0.05, 0.05, 0.05))
        canvas.fill(box(u, w, cx, ey, 0.03, 0.012), (0.05, 0.05, 0.05))
    mouth = np.maximum(np.abs(disc(u, w, cx, ey + 0.07, 0.05)) - 0.01, ey + 0.085 - w)
    canvas.fill(mouth, (0.05, 0.05, 0.05))
    if has("beard"):
        chin = polygon(u, w, [(cx - 0.11, ey + 0.14), (cx + 0.11, ey + 0.14), (cx, ey + 0.32)])
        canvas.fill(chin, (0.93, 0.93, 0.93))
    if has("hat"):
        _hat(canvas, cx, cy - ry * 0.93, 0.16)


def _hat(canvas: Canvas, cx: float, y: float, half: float) -> None:
    canvas.fill(box(canvas.u, canvas.w, cx, y, half, 0.024), (0.10, 0.10, 0.35))
    canvas.fill(box(canvas.u, canvas.w, cx, y - 0.085, half * 0.6, 0.075), (0.10, 0.10, 0.35))
    canvas.fill(box(canvas.u, canvas.w, cx, y - 0.045, half * 0.6, 0.017), (0.97, 0.86, 0.15))


def draw_person(canvas: Canvas, scene: Scene) -> None:
    """A standing person; `scene.color` is the colour of the clothes."""
    width, height, _, eye_size, eye_distance, hair, tone = scene.body
    skin = _mix((0.98, 0.82, 0.68), (0.42, 0.26, 0.16), tone)
    cloth = v.ALL_COLORS[scene.color]
    u, w = canvas.u, canvas.w
    cx, head, top = 0.5, 0.135, 0.33
    has = scene.attributes.__contains__
    hair_color = _mix((0.16, 0.10, 0.06), (0.85, 0.65, 0.25), hair)
    if has("longhair"):
        canvas.fill(box(u, w, cx, top + 0.07, 0.175, 0.20, 0.08), hair_color)
    for side in (-1, 1):
        canvas.fill(box(u, w, cx + side * 0.075, 0.9, 0.05, 0.14), (0.20, 0.22, 0.30))
        canvas.fill(box(u, w, cx + side * (0.19 + 0.03 * width), 0.62, 0.042, 0.14, 0.04), cloth)
        canvas.fill(disc(u, w, cx + side * (0.19 + 0.03 * width), 0.78, 0.042), skin)
    canvas.fill(box(u, w, cx, 0.65, 0.15 + 0.03 * width, 0.17 + 0.02 * height, 0.05), cloth)
    canvas.fill(disc(u, w, cx, top, head), skin)
    canvas.fill(np.maximum(disc(u, w, cx, top, head + 0.012), w - (top - 0.065)), hair_color)
    gap = 0.045 + 0.015 * eye_distance
    for side in (-1, 1):
        canvas.fill(disc(u, w, cx + side * gap, top - 0.01, 0.014 + 0.008 * eye_size), (0.05, 0.05, 0.05))
    if has("beard"):
        canvas.fill(np.maximum(disc(u, w, cx, top + 0.03, head * 0.92), top + 0.055 - w), (0.93, 0.93, 0.93))
    else:
        canvas.fill(np.maximum(np.abs(disc(u, w, cx, top + 0.03, 0.05)) - 0.009, top + 0.05 - w), (0.45, 0.10, 0.10))
    if has("glasses"):
        for side in (-1, 1):
            canvas.fill(np.abs(disc(u, w, cx + side * 0.06, top - 0.01, 0.047)) - 0.013, (0.05, 0.05, 0.05))
    if has("scarf"):
        canvas.fill(box(u, w, cx, top + head + 0.025, 0.12, 0.035, 0.02), (0.87, 0.13, 0.13))
        canvas.fill(box(u, w, cx + 0.07, top + head + 0.12, 0.035, 0.10), (0.87, 0.13, 0.13))
    if has("hat"):
        _hat(canvas, cx, top - 0.10, 0.19)


def draw_sign(canvas: Canvas, scene: Scene) -> None:
    """A board on a post with one or two dot-matrix letters."""
    u, w = canvas.u, canvas.w
    board = v.ALL_COLORS[scene.color]
    ink = (0.97, 0.97, 0.97) if sum(board) < 1.6 else (0.05, 0.05, 0.05)
    canvas.fill(box(u, w, 0.5, 0.85, 0.035, 0.2), (0.35, 0.22, 0.10))
    canvas.fill(box(u, w, 0.5, 0.42, 0.40, 0.29, 0.03), ink)
    canvas.fill(box(u, w, 0.5, 0.42, 0.37, 0.26, 0.02), board)
    dot = 0.052
    for index, glyph in enumerate(scene.text):
        left = 0.5 + (index - len(scene.text) / 2) * 6.4 * dot + 0.2 * dot
        for row, line in enumerate(GLYPH_ROWS[glyph]):
            for column, mark in enumerate(line):
                if mark == "#":
                    cx, cy = left + (column + 0.5) * dot, 0.42 + (row - 3) * dot
                    canvas.fill(box(u, w, cx, cy, dot * 0.53, dot * 0.53), ink)


def render(scene: Scene, size: int = 64) -> np.ndarray:
    """Draw `scene` as a uint8 array `[size, size, 3]` (RGB)."""
    canvas = Canvas(2 * size)
    rng = np.random.default_rng(scene.seed)
    draw_background(canvas, scene.background, rng)
    if scene.kind == "critter":
        draw_critter(canvas, scene)
    elif scene.kind == "person":
        draw_person(canvas, scene)
    elif scene.kind == "sign":
        draw_sign(canvas, scene)
    for thing in scene.things:
        draw_thing(canvas, thing)
    pixels = canvas.pixels.reshape(size, 2, size, 2, 3).mean((1, 3))
    pixels = styles.apply(scene.style, pixels, np.random.default_rng([scene.seed, 1]))
    return (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)


def render_image(scene: Scene, size: int = 64) -> Image.Image:
    return Image.fromarray(render(scene, size))
