"""Tables of the matrix: figures with their intervals, orders that papers report, costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_personalize.metrics.alignment import interval
from lit_personalize.report.running import Cell
from lit_personalize.report.science import METHODS, SEEDS, STYLE_METHODS
from lit_personalize.tinyworld.concepts import SUBJECTS_FOR_SCIENCE
from lit_personalize.tinyworld.style_concepts import STYLES_FOR_SCIENCE

Cells = dict[Cell, dict[str, Any]]
NEAREST = "nearest training picture"
COLUMNS = (
    "attributes", "all attributes", "background", "CLIP-I", "CLIP-T", "CLIP-T normalised", "KID x 1000, class prompt",
    NEAREST,
)  # fmt: skip
STYLE_COLUMNS = (
    "style", "content", "style and content", "CLIP-I", "CLIP-T", "CLIP-T normalised", "KID x 1000, plain prompts",
    "style, plain prompts",
)  # fmt: skip
UNDECIDED = "not reproduced: undecided"


@dataclass(frozen=True)
class Order:
    """A paper's claim: `better` has the higher (or, for KID, the lower) `figure`."""

    figure: str
    better: str
    worse: str
    source: str
    lower: bool = False


CUSTOM, ABLATION, OFT = "Kumari et al., table 1", "Kumari et al., ablation", "Qiu et al., table 1"
KID = "KID x 1000, class prompt"
ORDERS = (
    Order("CLIP-T", "Custom Diffusion", "Textual Inversion", f"{CUSTOM}: 0.795, 0.670"),
    Order("CLIP-T", "Custom Diffusion", "DreamBooth", f"{CUSTOM}: 0.795, 0.781"),
    Order("CLIP-I", "Textual Inversion", "Custom Diffusion", f"{CUSTOM}: 0.827, 0.775"),
    Order(KID, "Custom Diffusion", "DreamBooth", f"{CUSTOM}: 20.96, 32.53", True),
    Order("CLIP-I", "Custom Diffusion", "Custom Diffusion, fine-tune all", f"{ABLATION}: 0.775, 0.748"),
    Order(KID, "Custom Diffusion, fine-tune all", "Custom Diffusion", f"{ABLATION}: 19.27, 20.96", True),
    Order(KID, "Custom Diffusion", "Custom Diffusion, no regularization", f"{ABLATION}: 20.96, 32.64", True),
    Order(KID, "Custom Diffusion", "Custom Diffusion, generated set", f"{ABLATION}: 20.96, 34.70", True),
    Order("CLIP-I", "Custom Diffusion", "Custom Diffusion, no regularization", f"{ABLATION}: 0.775, 0.756"),
    Order("CLIP-I", "Custom Diffusion", "Custom Diffusion, no augmentation", f"{ABLATION}: 0.775, 0.736"),
    Order("CLIP-I", "OFT", "DreamBooth-LoRA", f"{OFT}: 0.785, 0.765"),
    Order("CLIP-I", "OFT", "DreamBooth", f"{OFT}: 0.785, 0.778"),
)


def of_subjects(cells: Cells) -> Cells:
    return {cell: row for cell, row in cells.items() if cell[1] in SUBJECTS_FOR_SCIENCE}


def of_styles(cells: Cells) -> Cells:
    return {cell: row for cell, row in cells.items() if cell[1] in STYLES_FOR_SCIENCE}


def column(cells: Cells, method: str, figure: str) -> Tensor:
    """A figure of a method's cells; cells measured before it was added lack it and are left out."""
    found = [row[figure] for (m, _, _), row in cells.items() if m == method and figure in row]
    return torch.tensor(found, dtype=torch.float64)


def with_interval(values: Tensor) -> str:
    """Mean and 95 % bootstrap interval, or "missing"."""
    if not len(values):
        return "missing"
    low, high = interval(values)
    return f"{float(values.mean()):.3f} [{low:.3f}, {high:.3f}]"


def lines_of(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    found = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    return "\n".join(found + [f"| {' | '.join(row)} |" for row in rows])


def table(cells: Cells, methods: tuple[str, ...] = tuple(METHODS)) -> str:
    """One row per method over its cells of subjects; missing cells are counted."""
    return _table(of_subjects(cells), methods, COLUMNS, len(SUBJECTS_FOR_SCIENCE) * len(SEEDS))


def style_table(cells: Cells, methods: tuple[str, ...] = STYLE_METHODS) -> str:
    """Likewise of styles."""
    return _table(of_styles(cells), methods, STYLE_COLUMNS, len(STYLES_FOR_SCIENCE) * len(SEEDS))


def _table(cells: Cells, methods: tuple[str, ...], columns: tuple[str, ...], total: int) -> str:
    rows = []
    for method in methods:
        figures = [column(cells, method, name) for name in columns]
        rows.append([method, f"{len(figures[0])}/{total}", *map(with_interval, figures)])
    return lines_of(["method", "cells", *columns], rows)


def references(cells: Cells, names: Sequence[str], untouched: str) -> str:
    """What real pictures and the untouched base score on the same prompts."""
    rows = []
    for label, suffix in (("real pictures, unseen", "real"), (f"untouched base, {untouched}", "base")):
        found = [[c[name] for c in cells.values() if name in c] for name in (f"{n}, {suffix}" for n in names)]
        values = [torch.tensor(row, dtype=torch.float64) for row in found]
        rows.append([label, *(f"{float(v.mean()):.3f}" if len(v) else "missing" for v in values)])
    return lines_of(["", *names], rows)


def effect(cells: Cells, figure: str, better: str, worse: str) -> Tensor:
    """Differences of two methods over cells of one subject and seed."""
    first, second = (
        {(s, seed): row[figure] for (m, s, seed), row in cells.items() if m == method and figure in row}
        for method in (better, worse)
    )
    return torch.tensor([first[pair] - second[pair] for pair in sorted(first.keys() & second.keys())]).double()


def verdict(values: Tensor, lower: bool = False) -> tuple[str, str]:
    """A mean difference with its interval, and whether it is on the claimed side of 0."""
    if not len(values):
        return "missing", "not measured"
    low, high = interval(-values if lower else values)
    said = "reproduced" if low > 0 else "not reproduced: the opposite" if high < 0 else UNDECIDED
    return with_interval(values), said


def judge(cells: Cells, order: Order) -> tuple[str, str]:
    """Effect with its interval over pairs of cells of one subject and seed, and the verdict."""
    return verdict(effect(of_subjects(cells), order.figure, order.better, order.worse), order.lower)


def orders(cells: Cells) -> str:
    rows, total = [], len(SUBJECTS_FOR_SCIENCE) * len(SEEDS)
    for order in ORDERS:
        sign = "below" if order.lower else "above"
        claim = f"{order.figure}: {order.better} {sign} {order.worse}"
        found, said = judge(cells, order)
        pairs = len(effect(of_subjects(cells), order.figure, order.better, order.worse))
        partly = f" ({pairs} of {total} pairs so far)" if 0 < pairs < total else ""
        rows.append([claim, order.source, found, said + partly])
    return lines_of(["claim", "paper", "effect here (first less second)", "verdict"], rows)


def memorising(cells: Cells) -> str:
    """Nearest training picture, less that of real unseen pictures on the same prompts: above 0 is too near."""
    rows = []
    for method in METHODS:
        nearest, real = (column(of_subjects(cells), method, f"{NEAREST}{of}") for of in ("", ", real"))
        if not len(nearest):
            rows.append([method, "missing", "not measured"])
            continue
        low, high = interval(nearest - real)
        said = "nearer than real pictures" if low > 0 else "no" if high < 0 else "undecided"
        rows.append([method, with_interval(nearest - real), said])
    return lines_of(["method", "nearest, less that of real pictures", "memorising"], rows)


def cost_table(costs: Mapping[str, Any] | None, methods: Sequence[str] = tuple(METHODS)) -> str:
    """Of `costs.json`; methods that it lacks are missing."""
    rows = []
    for method in methods:
        if costs is None or method not in costs["methods"]:
            rows.append([method, *["missing"] * 5])
            continue
        row = costs["methods"][method]
        rows.append([method, f"{row['trained parameters']:,}", f"{row['steps per second']:.2f}",
                     f"{row['speed ratio']:.2f}", f"{row['peak bytes'] / 2**20:.0f}",
                     f"{row['file bytes'] / 2**10:,.0f}"])  # fmt: skip
    head = ["method", "trained parameters", "steps/s", "ratio of speed", "peak memory, MiB", "file, KiB"]
    return lines_of(head, rows)
