"""From the cells of the science matrix to the text that stands in docs; a test compares both.

    python -m lit_personalize.report.pages [--check]
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_personalize.errors import DataError
from lit_personalize.metrics.alignment import interval
from lit_personalize.report.science import METHODS, OPTIONS, SEEDS, cell_id, load_cells
from lit_personalize.sampling.grid import captioned_grid
from lit_personalize.tinyworld.concepts import SUBJECTS_FOR_SCIENCE

Cells = dict[tuple[str, str, int], dict[str, Any]]
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NEAREST = "nearest training picture"
COLUMNS = (
    "attributes", "all attributes", "background", "CLIP-I", "CLIP-T", "CLIP-T normalised", "KID x 1000, class prompt",
    NEAREST,
)  # fmt: skip
REFERENCES = ("real picture", "untouched base")
"""What stands beside the adapter's picture in a cell's file, from left to right."""
BAR = {"attributes": 0.70, "background": 0.85}
"""What the best recipe must reach."""
SCHEDULERS = {"ddim": "DDIM", "dpm": "DPM-Solver++", "euler": "Euler"}
PAGES = {"Custom Diffusion": "custom_diffusion", "DreamBooth-LoRA": "dreambooth_lora",
         "Textual Inversion": "textual_inversion"}  # fmt: skip


@dataclass(frozen=True)
class Order:
    """A claim of Kumari et al. (2022): `better` has the higher (or, for KID, the lower) `figure`."""

    figure: str
    better: str
    worse: str
    source: str
    lower: bool = False


TABLE_1, ABLATION = "table 1", "ablation"
ORDERS = (
    Order("CLIP-T", "Custom Diffusion", "Textual Inversion", f"{TABLE_1}: 0.795, 0.670"),
    Order("CLIP-T", "Custom Diffusion", "DreamBooth-LoRA", f"{TABLE_1}: 0.795, 0.781 (full fine-tuning)"),
    Order("CLIP-I", "Textual Inversion", "Custom Diffusion", f"{TABLE_1}: 0.827, 0.775"),
    Order("KID x 1000, class prompt", "Custom Diffusion", "DreamBooth-LoRA", f"{TABLE_1}: 20.96, 32.53", True),
    Order("KID x 1000, class prompt", "Custom Diffusion", "Custom Diffusion, no regularization",
          f"{ABLATION}: 20.96, 32.64", True),
    Order("KID x 1000, class prompt", "Custom Diffusion", "Custom Diffusion, generated set",
          f"{ABLATION}: 20.96, 34.70", True),
    Order("CLIP-I", "Custom Diffusion", "Custom Diffusion, no regularization", f"{ABLATION}: 0.775, 0.756"),
    Order("CLIP-I", "Custom Diffusion", "Custom Diffusion, no augmentation", f"{ABLATION}: 0.775, 0.736"),
)  # fmt: skip


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


def table(cells: Cells, methods: tuple[str, ...] = tuple(METHODS)) -> str:
    """One row per method over its cells; missing cells are counted."""
    total = len(SUBJECTS_FOR_SCIENCE) * len(SEEDS)
    lines = ["| method | cells | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 2) + "|"]
    for method in methods:
        figures = [column(cells, method, name) for name in COLUMNS]
        lines.append(f"| {method} | {len(figures[0])}/{total} | " + " | ".join(map(with_interval, figures)) + " |")
    return "\n".join(lines)


def references(cells: Cells) -> str:
    """What real pictures and the untouched base score on the same prompts."""
    names = ("attributes", "all attributes", "background", "CLIP-I", "CLIP-T", NEAREST)
    lines = ["| | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    for label, suffix in (("real pictures, unseen", "real"), ("untouched base, class noun", "base")):
        found = [[c[name] for c in cells.values() if name in c] for name in (f"{n}, {suffix}" for n in names)]
        values = [torch.tensor(row, dtype=torch.float64) for row in found]
        shown = [f"{float(v.mean()):.3f}" if len(v) else "missing" for v in values]
        lines.append(f"| {label} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def judge(cells: Cells, order: Order) -> tuple[str, str]:
    """Effect with its interval over pairs of cells of one subject and seed, and the verdict."""
    better, worse = (
        {(s, seed): row[order.figure] for (m, s, seed), row in cells.items() if m == method and order.figure in row}
        for method in (order.better, order.worse)
    )
    if not (pairs := sorted(better.keys() & worse.keys())):
        return "missing", "not measured"
    sign = -1.0 if order.lower else 1.0
    effect = torch.tensor([better[pair] - worse[pair] for pair in pairs], dtype=torch.float64)
    low, high = interval(sign * effect)
    verdict = "reproduced" if low > 0 else "not reproduced: the opposite" if high < 0 else "not reproduced: undecided"
    return with_interval(effect), verdict


def orders(cells: Cells) -> str:
    lines = ["| claim | paper | effect here (first less second) | verdict |", "| --- | --- | --- | --- |"]
    for order in ORDERS:
        effect, verdict = judge(cells, order)
        sign = "below" if order.lower else "above"
        lines.append(f"| {order.figure}: {order.better} {sign} {order.worse} | {order.source} | {effect} | {verdict} |")
    return "\n".join(lines)


def bar(cells: Cells) -> str:
    """The best recipe against the quality bar."""
    full = [m for m in METHODS if len(column(cells, m, "attributes"))]
    if not full:
        return "Quality bar: not measured."
    best = max(full, key=lambda m: float(min(column(cells, m, name).mean() - least for name, least in BAR.items())))
    parts = [f"{name} {float(column(cells, best, name).mean()):.1%} (bar {least:.0%})" for name, least in BAR.items()]
    met = all(float(column(cells, best, name).mean()) >= least for name, least in BAR.items())
    whole = float(column(cells, best, "all attributes").mean())
    done, total = len(column(cells, best, "attributes")), len(SUBJECTS_FOR_SCIENCE) * len(SEEDS)
    return (
        f"Quality bar, best recipe ({best}), over {done} of its {total} cells: "
        f"{', '.join(parts)}: {'met' if met else 'not met'}.\n"
        f"Every attribute at once is found in {whole:.1%} of its pictures."
    )


def memorising(cells: Cells) -> str:
    """Nearest training picture, less that of real unseen pictures on the same prompts: above 0 is too near."""
    lines = ["| method | nearest, less that of real pictures | memorising |", "| --- | --- | --- |"]
    for method in METHODS:
        nearest, real = (column(cells, method, f"{NEAREST}{of}") for of in ("", ", real"))
        if not len(nearest):
            lines.append(f"| {method} | missing | not measured |")
            continue
        low, high = interval(nearest - real)
        verdict = "nearer than real pictures" if low > 0 else "no" if high < 0 else "undecided"
        lines.append(f"| {method} | {with_interval(nearest - real)} | {verdict} |")
    return "\n".join(lines)


def overview(cells: Cells, fingerprint: str) -> str:
    seconds = column(cells, "Custom Diffusion", "seconds")
    cost = f" A Custom Diffusion cell took {float(seconds.median()):.0f} s." if len(seconds) else ""
    count, seeds = len(SUBJECTS_FOR_SCIENCE), ", ".join(map(str, SEEDS))
    return f"""# Methods on the embedded world

{count} held-out subjects, five pictures each with captions that name the background, seeds {seeds}; base
`{fingerprint}`. Pictures: {OPTIONS.steps} steps of {SCHEDULERS[OPTIONS.scheduler]}, guidance {OPTIONS.guidance:g}.
Written by `make science` from the cells in this folder. Mean and 95 % bootstrap interval over subjects and seeds.{cost}

{table(cells)}

{references(cells)}

{bar(cells)}

![a picture per method and subject](pictures.png)

*The first unseen prompt of each subject, seed {SEEDS[0]}, not selected.*

*attributes*: share of the subject's attributes that the reader finds, *all attributes*: of pictures with every one of
them, *background*: of pictures with the asked background; prompts are unseen, "unclear" is wrong. *CLIP-I*: mean cosine
with the training pictures; *nearest*: largest cosine. *CLIP-T*: cosine with the asked caption, the new word left out;
*normalised*: 0 is the mean of the other captions, 1 the best of all. *KID*: class pictures with the adapter against
those of the untouched base, an unbiased estimate that may be negative; Textual Inversion leaves those pictures as they
are, so that its row is the base against itself. Features are those of the embedded CLIP.

{memorising(cells)}

Memorising: whether the pictures lie nearer to a training picture than real unseen pictures of the subject do.

## Orders that the paper reports

{orders(cells)}

Pairs are cells of one subject and seed; "reproduced" means that the 95 % interval of the mean difference excludes 0.
"""


def sheet(science: Path, fingerprint: str) -> Image.Image | None:
    """The first seed's pictures, one column per subject: real, untouched base, then a row per method.

    None without pictures; a missing one is gray.
    """
    rows: dict[str, list[np.ndarray]] = {name: [] for name in (*REFERENCES, *METHODS)}
    blank, found = np.full((64, 3 * 64, 3), 128, np.uint8), False
    for subject in SUBJECTS_FOR_SCIENCE:
        shown: dict[str, np.ndarray] = {}
        for method in METHODS:
            path = science / f"{cell_id(method, subject, SEEDS[0], fingerprint)}.png"
            if path.exists():
                with Image.open(path) as strip:
                    shown[method] = np.asarray(strip)
        found = found or bool(shown)
        references = next(iter(shown.values()), blank)
        for part, name in enumerate(REFERENCES, start=1):
            rows[name].append(references[:, 64 * part : 64 * (part + 1)])
        for method in METHODS:
            rows[method].append(shown.get(method, blank)[:, :64])
    captions = [name for name, row in rows.items() for _ in row]
    pictures = np.stack([tile for row in rows.values() for tile in row])
    return captioned_grid(pictures, captions, len(SUBJECTS_FOR_SCIENCE)) if found else None


def excerpt(cells: Cells, method: str) -> str:
    """What stands on a method's own page."""
    methods = tuple(m for m in METHODS if m == method or m.startswith(f"{method},"))
    if not any(m in methods for m, _, _ in cells):
        return "Not measured on the present base."
    return f"{table(cells, methods)}\n\nColumns, references and intervals: [all methods](../science/README.md)."


def pages(docs: Path, cells: Cells, fingerprint: str) -> dict[Path, str]:
    """The text of every page that holds numbers, by path.

    Raises:
        DataError: A page lacks its marks.
    """
    found = {docs / "science" / "README.md": overview(cells, fingerprint)} if cells else {}
    for method, name in PAGES.items():
        path = docs / "methods" / f"{name}.md"
        text = path.read_text(encoding="utf-8")
        if BEGIN not in text or END not in text:
            raise DataError(f"{path} lacks the lines {BEGIN} and {END} between which its numbers go")
        block = f"{BEGIN}\n{excerpt(cells, method)}\n{END}"
        found[path] = re.sub(f"{BEGIN}.*?{END}", lambda _, b=block: b, text, flags=re.DOTALL)  # type: ignore[misc]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the measured numbers into docs.")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is stale")
    options = parser.parse_args()
    cells, fingerprint = load_cells(options.docs / "science")
    stale = 0
    for path, text in pages(options.docs, cells, fingerprint).items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale += 1
            print(f"{path}: {'stale' if options.check else 'written'}")
            if not options.check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    if not options.check and (pictures := sheet(options.docs / "science", fingerprint)):
        pictures.save(options.docs / "science" / "pictures.png")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
