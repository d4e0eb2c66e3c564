"""Curves of several runs in one coordinate system, as SVG that a page holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Curve = Sequence[tuple[int, float]]
WIDTH, WIDER, HEIGHT = 620, 1240, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 12, 34
FEW = 30
"""Points of a curve up to which it is drawn as it is; a longer one is drawn smoothed, over the raw one."""
SPREAD = 50
"""Ratio of the largest to the smallest value from which the axis is logarithmic."""
COLOURS = ("#0b6bcb", "#d9480f", "#2b8a3e", "#ae3ec9", "#b08900", "#0c8599", "#c2255c", "#5f6b7a")
"""In an order in which neighbours differ, readable on light and dark paper."""


@dataclass(frozen=True)
class Line:
    """What the template draws of one run."""

    number: int
    """Of the run."""
    colour: str
    raw: str
    """Points of a polyline; "" where the smoothed one is as good."""
    smooth: str
    single: tuple[float, float] | None
    """Centre of a mark where there is one point only."""


@dataclass(frozen=True)
class Chart:
    """One figure of all runs."""

    name: str
    width: int
    lines: list[Line]
    """Of the runs that have a point."""
    ticks_x: list[tuple[float, str]]
    ticks_y: list[tuple[float, str]]
    logarithmic: bool
    shown: list[list[tuple[int, float]]]
    """Finite points, for reading values off."""
    span: tuple[float, float]
    """First and last step."""


def colours_of(count: int) -> list[str]:
    """One colour for each of `count` runs: distinct ones of a few, from blue to red in order of many."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return [f"hsl({230 - 230 * i / (count - 1):.0f} 65% 50%)" for i in range(count)]


def chart_of(name: str, curves: Sequence[Curve], width: int = WIDTH) -> Chart | None:
    """Scale and smooth the curves of a figure; None where none has a finite point.

    Args:
        curves: Of each run, (step, value), maybe empty.
    """
    finite = [[(step, value) for step, value in curve if math.isfinite(value)] for curve in curves]
    points = [point for curve in finite for point in curve]
    if not points:
        return None
    low, high = min(v for _, v in points), max(v for _, v in points)
    logarithmic = low > 0 and high / low >= SPREAD
    first, last = min(s for s, _ in points), max(s for s, _ in points)
    first, last = (0, max(last, 1)) if first < last / 3 or first == last else (first, last)
    if logarithmic:
        low, high = math.log10(low), math.log10(high)
    margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    low, high = low - margin, high + margin

    def across(step: float) -> float:
        return round(LEFT + (step - first) / (last - first) * (width - LEFT - RIGHT), 1)

    def down(value: float) -> float:
        level = math.log10(value) if logarithmic else value
        return round(TOP + (high - level) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    def drawn(curve: Curve) -> str:
        return " ".join(f"{across(step)},{down(value)}" for step, value in curve)

    lines = []
    for number, (colour, curve) in enumerate(zip(colours_of(len(curves)), finite, strict=True)):
        if not curve:
            continue
        single = (across(curve[0][0]), down(curve[0][1])) if len(curve) == 1 else None
        raw = drawn(curve) if len(curve) > FEW else ""
        lines.append(Line(number, colour, raw, drawn(smoothed(curve)), single))
    heights = _powers(low, high) if logarithmic else _steps(low, high)
    return Chart(
        name, width, lines, [(across(step), f"{step:g}") for step in _steps(first, last, whole=True)],
        [(down(value), f"{value:g}") for value in heights], logarithmic, finite, (first, last),
    )  # fmt: skip


def smoothed(curve: Curve) -> list[tuple[int, float]]:
    """Means over the neighbours within a fifteenth of a long curve; a short one as it is."""
    if len(curve) <= FEW:
        return list(curve)
    reach = max(1, len(curve) // 30)
    values = [value for _, value in curve]
    means = []
    for i, (step, _) in enumerate(curve):
        near = min(reach, i, len(curve) - 1 - i)  # shorter at the ends, so that they are not bent
        window = values[i - near : i + near + 1]
        means.append((step, sum(window) / len(window)))
    return means


def _steps(low: float, high: float, whole: bool = False) -> list[float]:
    """About five round numbers from `low` to `high`."""
    size = 10.0 ** math.floor(math.log10((high - low) / 4))
    size *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (size * factor) <= 6)
    size = max(size, 1.0) if whole else size
    return [round(k * size, 12) for k in range(math.ceil(low / size), math.floor(high / size) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten within two exponents, with 2 and 5 between them where there are few."""
    factors = (1,) if high - low > 4 else (1, 2, 5)
    found = [factor * 10.0**k for k in range(math.floor(low), math.ceil(high) + 1) for factor in factors]
    return [value for value in found if low <= math.log10(value) <= high]
