"""From the results of `quality` and `effect` to docs/retrieval_quality.md; a test compares both.

python -m lit_personalize.report.retrieval.pages [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_personalize.atomic import write_text
from lit_personalize.metrics.alignment import interval
from lit_personalize.report.retrieval.effect import SETS, SUBJECTS, Cells, load_cells
from lit_personalize.report.retrieval.quality import PICTURES, RESULTS
from lit_personalize.report.retrieval.queries import BY, CLASS, NARROW
from lit_personalize.report.science import SEEDS
from lit_personalize.report.tables import with_interval

Rows = Sequence[dict[str, Any]]
SEARCHES = {"clip": "CLIP", "substring": "substring", "words": "whole words"}
MEASURES = ("precision", "recall")
KID = "KID x 1000, class prompt"
FIGURES = (KID, f"{KID} to real", "attributes", "background", "CLIP-I", "CLIP-T")
FOLDER, PAGE = "retrieval_quality", "retrieval_quality.md"


def share(row: dict[str, Any], search: str, measure: str, n: int) -> float:
    """Precision at `n`, of all `n` places, also empty ones; or recall, of all relevant pictures of the corpus."""
    return float(row[search]["hits"]) / (n if measure == "precision" else row["relevant"])


def column(rows: Rows, search: str, measure: str, n: int) -> Tensor:
    return torch.tensor([share(row, search, measure, n) for row in rows], dtype=torch.float64)


def ceiling(rows: Rows, measure: str, n: int) -> float:
    """What a search would reach that returns the captions which say all that is asked, and no others."""
    parts = [min(n, row["said"]) / (n if measure == "precision" else row["relevant"]) for row in rows]
    return sum(parts) / len(parts)


def verdict(rows: Rows, other: str, measure: str, n: int) -> tuple[str, str]:
    """The mean difference of CLIP to another search over queries with its interval, and what follows."""
    difference = column(rows, "clip", measure, n) - column(rows, other, measure, n)
    low, high = interval(difference)
    said = "reached" if low > 0 else "not reached: the opposite" if high < 0 else "not reached: undecided"
    return with_interval(difference), said


def claims(rows: Rows, n: int) -> str:
    lines = ["| queries | measure | CLIP less | difference | CLIP above |", "| --- | --- | --- | --- | --- |"]
    for label, chosen in kinds(rows):
        for measure in MEASURES:
            for other in ("substring", "words"):
                difference, said = verdict(chosen, other, measure, n)
                lines.append(f"| {label} | {measure} | {SEARCHES[other]} | {difference} | {said} |")
    return "\n".join(lines)


def asked_by(pictures: int) -> str:
    return "text" if not pictures else "1 picture" if pictures == 1 else f"{pictures} pictures"


def kinds(rows: Rows) -> list[tuple[str, Rows]]:
    """The narrow queries by what asks them: text, one picture, several."""
    narrow = [row for row in rows if row["group"] in NARROW]
    return [(asked_by(by), [row for row in narrow if row["pictures"] == by]) for by in BY]


def summary(rows: Rows, n: int) -> str:
    """Precision and recall of every search, with intervals over queries, and the ceiling of the captions."""
    heads = [f"{name}: {measure}" for name in SEARCHES.values() for measure in MEASURES]
    lines = ["| queries | | relevant | " + " | ".join(heads) + " | captions that say it: precision, recall |",
             "| --- " * (len(heads) + 4) + "|"]  # fmt: skip
    wide = [row for row in rows if row["group"] == CLASS]
    for label, chosen in (*kinds(rows), (f"text, {CLASS}", wide)):
        figures = [with_interval(column(chosen, search, m, n)) for search in SEARCHES for m in MEASURES]
        lines.append(_line(label, chosen, figures, n))
    return "\n".join(lines)


def groups(rows: Rows, n: int) -> str:
    """The same for each group of queries, means alone."""
    heads = [f"{name}: {measure}" for name in SEARCHES.values() for measure in MEASURES]
    lines = ["| queries | | relevant | " + " | ".join(heads) + " | captions that say it: precision, recall |",
             "| --- " * (len(heads) + 4) + "|"]  # fmt: skip
    for label, chosen in kinds(rows):
        for group in NARROW:
            part = [row for row in chosen if row["group"] == group]
            means = [f"{float(column(part, search, m, n).mean()):.3f}" for search in SEARCHES for m in MEASURES]
            lines.append(_line(f"{label}: {group}", part, means, n))
    return "\n".join(lines)


def _line(label: str, rows: Rows, figures: list[str], n: int) -> str:
    relevant = sum(row["relevant"] for row in rows) / len(rows)
    best = ", ".join(f"{ceiling(rows, measure, n):.3f}" for measure in MEASURES)
    return f"| {label} | {len(rows)} | {relevant:.0f} | " + " | ".join(figures) + f" | {best} |"


def failing(rows: Rows, n: int) -> str:
    """The queries of which CLIP finds fewer than the search for substrings: those of text by name."""
    lost = {by: [r for r in chosen if r["clip"]["hits"] < r["substring"]["hits"]] for by, chosen in kinds(rows)}
    parts = [f"{len(lost[by])} of {len(chosen)} queries by {by}" for by, chosen in kinds(rows)]
    said = f"The search for substrings finds more in {', '.join(parts[:-1])} and {parts[-1]}."
    named = "; ".join(f"{row['text']} ({row['clip']['hits']}, {row['substring']['hits']})" for row in lost["text"])
    return f"{said} Of text, with the hits in {n} of CLIP and of that search: {named}." if named else said


def every_query(rows: Rows, n: int) -> str:
    lines = ["| query | asked by | relevant | said | CLIP: hits, P, R | substring: found, hits, P, R | "
             "whole words: found, hits, P, R |", "| --- " * 7 + "|"]  # fmt: skip
    for row in rows:
        cells = [row["text"], asked_by(row["pictures"]), str(row["relevant"]), str(row["said"])]
        for search in SEARCHES:
            figures = [str(row[search]["hits"]), *(f"{share(row, search, m, n):.3f}" for m in MEASURES)]
            cells.append(", ".join(figures if search == "clip" else [str(row[search]["found"]), *figures]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def effects(cells: Cells) -> str:
    """Every figure by set, and the paired differences to the retrieved set."""
    total = len(SUBJECTS) * len(SEEDS)
    heads = " | ".join(FIGURES)
    lines = [f"| set | cells | {heads} |", "| --- " * (len(FIGURES) + 2) + "|"]
    for name in SETS:
        rows = [row for (s, _, _), row in cells.items() if s == name]
        values = [torch.tensor([row[figure] for row in rows], dtype=torch.float64) for figure in FIGURES]
        lines.append(f"| {name} | {len(rows)}/{total} | " + " | ".join(map(with_interval, values)) + " |")
    for other in SETS[1:]:
        pairs = paired(cells, other)
        values = [torch.tensor([a[figure] - b[figure] for a, b in pairs], dtype=torch.float64) for figure in FIGURES]
        figures = " | ".join(map(with_interval, values))
        lines.append(f"| retrieved less {other} | {len(pairs)} pairs | {figures} |")
    return "\n".join(lines)


def paired(cells: Cells, other: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Cells of the retrieved and of another set with one subject and seed."""
    keys = [(subject, seed) for seed in SEEDS for subject in SUBJECTS]
    both = [(cells.get(("retrieved", *key)), cells.get((other, *key))) for key in keys]
    return [(a, b) for a, b in both if a is not None and b is not None]


def effect_verdicts(cells: Cells) -> str:
    """What the intervals say of KID; lower is nearer."""
    said = []
    for figure, nearer in ((KID, "nearer to the untouched base's"), (f"{KID} to real", "nearer to real pictures")):
        for other in SETS[1:]:
            pairs = paired(cells, other)
            if len(pairs) < (total := len(SUBJECTS) * len(SEEDS)):  # an interval over a few is none
                said.append(f"{figure}, retrieved against {other}: open, {len(pairs)} of {total} pairs are measured.")
                continue
            low, high = interval(torch.tensor([a[figure] - b[figure] for a, b in pairs], dtype=torch.float64))
            found = f"{nearer} with the retrieved set" if high < 0 else f"{nearer} with the {other} set"
            found = found if low > 0 or high < 0 else "undecided, the interval holds 0"
            said.append(f"{figure}, retrieved against {other}: {found}.")
    return "\n".join(f"* {line}" for line in said)


def page(results: dict[str, Any], cells: Cells) -> str:
    rows, n = results["rows"], results["n"]
    sizes = sorted({(row["subject"], row["pictures"]) for row in cells.values() if row["set"] == "retrieved"})
    counts = ", ".join(f"{count} for {subject}" for subject, count in sizes) or "not yet"
    return f"""# How good retrieval is on the embedded world

{results["pairs"]:,} rendered pairs of every class of the embedded world, held-out shapes, colours and textures among
them. Captions name the class in {results["named"]:.0%} of cases; else they paraphrase it ("love symbol" for a heart).
In a quarter of cases each they leave out colour, texture, background or a part; they use synonyms, and one in twelve
names a class that is not shown ("star rated seller").

All queries are asked in one pass of `litp data retrieve --n {n}` with a CLIP (`{results["encoder"]}`)
that was trained on other pictures with captions of the same grammar: it knows how to read this corpus. A picture is
relevant if it shows all that is asked, whatever its caption says; precision counts all {n} places, recall all relevant
pictures of the corpus. Searches for words take the first {n} captions, in the order of the corpus, that contain every
word of the query, as *substring* or as *whole word*. A picture that asks shows what a text asks, and other things too,
of which nothing says that they are not meant; several that ask together (a folder, as of a concept's photos) share what
the text asks. The searches for words get the words of that text.

Retrieving took {results["cpu seconds"]} CPU seconds on {results["cores"]} cores of {results["processor"]}.

{summary(rows, n)}

Mean and 95 % bootstrap interval over queries. *captions that say it*: of one who returns the captions that say
everything that is asked, and no others; which of the other pictures are relevant can only be guessed from captions.

## Is CLIP above the search for words?

{claims(rows, n)}

Differences are per query. {failing(rows, n)}

![the first pictures of six queries]({FOLDER}/{PICTURES})

*The first twelve of the first query of every group: asked by text, by pictures (in front), and by its words. A red
frame: the picture does not show what was asked.*

## By what is asked, means

{groups(rows, n)}

## What the set does to a training

Custom Diffusion of {" and ".join(SUBJECTS)}, seeds {", ".join(map(str, SEEDS))}; only the regularization set
differs: *retrieved* with `--query "photo of a CLASS"` from the corpus ({counts}), {n} *random* pairs of
the corpus, others for each seed, or {n} pictures *generated* by the base from the same prompt.

{effects(cells)}

{effect_verdicts(cells)}

*KID, class prompt*: pictures of the class prompt with the adapter against those of the untouched base; *to real*:
against 200 rendered pictures of the class; both on features of the embedded metric CLIP, an unbiased estimate from 32
pictures. Mean and 95 % bootstrap interval over subjects and seeds; a difference is between the cells of one subject and
seed.

## Every query

{every_query(rows, n)}

Written by `python -m lit_personalize.report.retrieval.pages` from the files in [{FOLDER}]({FOLDER}); measured by
`python -m lit_personalize.report.retrieval.quality WORK` and `python -m lit_personalize.report.retrieval.effect WORK`.
"""


def written(docs: Path) -> str:
    """The page of the results below `docs`."""
    results = json.loads((docs / FOLDER / RESULTS).read_text(encoding="utf-8"))
    return page(results, load_cells(docs / FOLDER))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write docs/retrieval_quality.md.")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is stale")
    options = parser.parse_args(arguments)
    text, place = written(options.docs), options.docs / PAGE
    stale = not place.exists() or place.read_text(encoding="utf-8") != text
    if stale and not options.check:
        write_text(place, text)
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
