"""From the cells of the science matrix to the text that stands in docs; a test compares both.

    python -m lit_personalize.report.pages [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_personalize.errors import DataError
from lit_personalize.report.bank_page import bank_tables
from lit_personalize.report.combination_tables import claims, way_table
from lit_personalize.report.combination_tables import page as combined
from lit_personalize.report.combinations import SUBJECT_IN_STYLE, TWO_SUBJECTS
from lit_personalize.report.kernel_page import kernel_tables
from lit_personalize.report.measures import OPTIONS
from lit_personalize.report.reliability import reliability_tables
from lit_personalize.report.science import METHODS, SEEDS, load_cells
from lit_personalize.report.sheets import sheets
from lit_personalize.report.tables import (
    COLUMNS,
    Cells,
    column,
    cost_table,
    memorising,
    of_styles,
    of_subjects,
    orders,
    references,
    style_table,
    table,
)
from lit_personalize.report.weights2weights_figure import draw_accuracy
from lit_personalize.report.weights2weights_page import WORLD, weights2weights_tables
from lit_personalize.tinyworld.concepts import SUBJECTS_FOR_SCIENCE
from lit_personalize.tinyworld.style_concepts import STYLES_FOR_SCIENCE

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
BAR = {"attributes": 0.70, "background": 0.85}
"""What the best recipe must reach."""
SCHEDULERS = {"ddim": "DDIM", "dpm": "DPM-Solver++", "euler": "Euler"}
PAGES = {"Custom Diffusion": "custom_diffusion", "DreamBooth-LoRA": "dreambooth_lora",
         "Textual Inversion": "textual_inversion", "DreamBooth": "dreambooth", "LoRA": "lora",
         "Pivotal Tuning": "pivotal_tuning", "OFT": "oft", "Cones": "cones"}  # fmt: skip
COMBINED = {"merging": TWO_SUBJECTS, "ziplora": SUBJECT_IN_STYLE}
"""Pages of ways of combining."""


def bar(cells: Cells) -> str:
    """The best recipe against the quality bar."""
    cells = of_subjects(cells)
    total = len(SUBJECTS_FOR_SCIENCE) * len(SEEDS)
    full = [m for m in METHODS if len(column(cells, m, "attributes")) == total]
    if not full:
        return "Quality bar: no method has all of its cells."
    best = max(full, key=lambda m: float(min(column(cells, m, name).mean() - least for name, least in BAR.items())))
    parts = [f"{name} {float(column(cells, best, name).mean()):.1%} (bar {least:.0%})" for name, least in BAR.items()]
    met = all(float(column(cells, best, name).mean()) >= least for name, least in BAR.items())
    whole = float(column(cells, best, "all attributes").mean())
    return (
        f"Quality bar, best recipe ({best}), over its {total} cells: "
        f"{', '.join(parts)}: {'met' if met else 'not met'}.\n"
        f"Every attribute at once is found in {whole:.1%} of its pictures."
    )


def overview(cells: Cells, fingerprint: str, costs: Mapping[str, Any] | None) -> str:
    subjects, styles = of_subjects(cells), of_styles(cells)
    seconds = column(subjects, "Custom Diffusion", "seconds")
    cost = f" A Custom Diffusion cell took {float(seconds.median()):.0f} s." if len(seconds) else ""
    count, seeds = len(SUBJECTS_FOR_SCIENCE), ", ".join(map(str, SEEDS))
    shown = [name for name in COLUMNS if not name.startswith("KID") and name != "CLIP-T normalised"]
    style_shown = ["style", "content", "style and content", "CLIP-I", "CLIP-T"]
    return f"""# Methods on the embedded world

{count} held-out subjects, five pictures each with captions that name the background, seeds {seeds}; base
`{fingerprint}`. Pictures: {OPTIONS.steps} steps of {SCHEDULERS[OPTIONS.scheduler]}, guidance {OPTIONS.guidance:g}.
Written by `make science` from the cells in this folder. Mean and 95 % bootstrap interval over subjects and seeds.{cost}

{table(cells)}

{references(subjects, shown, "class noun")}

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

## What the methods cost

{cost_table(costs)}

{cost_note(costs)}

## Orders that papers report

{orders(cells)}

Pairs are cells of one subject and seed; "reproduced" means that the 95 % interval of the mean difference excludes 0.
Kumari et al. (2022) is Custom Diffusion, arXiv 2212.04488; Qiu et al. (2023) OFT, arXiv 2306.07280.

## Styles

{len(STYLES_FOR_SCIENCE)} held-out styles ({", ".join(STYLES_FOR_SCIENCE)}), five pictures each of different contents,
captions such as "a cyan cross in the city in <new1> style"; the regularization set of a method that takes one shows
styles that the base knows.

{style_table(cells)}

{references(styles, style_shown, "no style asked")}

*style*: share of pictures of unseen contents in the style; *content*: of what the style leaves readable of the asked
scene; *plain prompts*: pictures asked for without the style, with the adapter: how far they moved from the untouched
base's (KID), and the share that shows the style all the same. CLIP-T is with the caption without the style.

![a picture per method and style](styles.png)

{combined(cells)}"""


def cost_note(costs: Mapping[str, Any] | None) -> str:
    """Where and when costs were measured."""
    if costs is None:
        return "Not measured."
    at = costs["circumstances"]
    return (
        f"{costs['rounds']} rounds of {costs['steps']} steps, methods in turns, medians; {at['date']}, commit "
        f"{at['commit']}, {at['processor']}, {at['threads']} threads, torch {at['torch']}. Peak memory is the whole\n"
        "process's. The file is that of the recipe's first export format, a LoRA within its declared error where it "
        "names none."
    )


def excerpt(cells: Cells, method: str, costs: Mapping[str, Any] | None) -> str:
    """What stands on a method's own page."""
    methods = tuple(m for m in METHODS if m == method or m.startswith(f"{method},"))
    if not any(m in methods for m, _, _ in cells):
        return "Not measured on the present base."
    return (
        f"{table(cells, methods)}\n\n{cost_table(costs, methods)}\n\nStyles:\n\n{style_table(cells, (method,))}\n\n"
        "Columns, references, intervals and the papers' claims: [all methods](../science/README.md)."
    )


def combined_excerpt(cells: Cells, kind: str) -> str:
    """What stands on the page of a way of combining."""
    if not any(cell[0] == kind for cell in cells):
        return "Not measured on the present base."
    return (
        f"{way_table(cells, kind)}\n\n{claims(cells, kind)}\n\n"
        "What was done and how it is read: [all methods](../science/README.md)."
    )


def load_costs(science: Path) -> dict[str, Any] | None:
    """The file that `report.costs` writes, if it is there."""
    path = science / "costs.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def pages(docs: Path, cells: Cells, fingerprint: str) -> dict[Path, str]:
    """The text of every page that holds numbers, by path.

    Raises:
        DataError: A page lacks its marks.
    """
    costs = load_costs(docs / "science")
    found = {docs / "science" / "README.md": overview(cells, fingerprint, costs)} if cells else {}
    blocks = {f"methods/{name}": excerpt(cells, method, costs) for method, name in PAGES.items()}
    blocks |= {f"methods/{name}": combined_excerpt(cells, kind) for name, kind in COMBINED.items()}
    if (results := docs.parent / "kernels/benchmarks/results").is_dir():
        blocks["kernels"] = kernel_tables(results)
    if (benchmarks := docs.parent / "benchmarks").is_dir():
        blocks["reliability"] = reliability_tables(benchmarks)
        blocks["bank"] = bank_tables(benchmarks)
        blocks["weights2weights"] = weights2weights_tables(benchmarks)
    for name, measured in blocks.items():
        path = docs / f"{name}.md"
        text = path.read_text(encoding="utf-8")
        if BEGIN not in text or END not in text:
            raise DataError(f"{path} lacks the lines {BEGIN} and {END} between which its numbers go")
        block = f"{BEGIN}\n{measured}\n{END}"
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
    if not options.check:
        for name, sheet in sheets(options.docs / "science", fingerprint).items():
            sheet.save(options.docs / "science" / f"{name}.png")
        draw_accuracy(options.docs.parent / "benchmarks" / WORLD, options.docs / "w2w_accuracy.png")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
