"""Tables of combined concepts: a row per way of combining, and the differences that papers claim."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_personalize.report.combinations import COMBINATIONS, SUBJECT_IN_STYLE, TWO_SUBJECTS, WAYS
from lit_personalize.report.science import SEEDS
from lit_personalize.report.tables import Cells, lines_of, verdict, with_interval

SINGLE = ("attributes", "background")
PAIR_COLUMNS = ("both colours", "one colour", "attributes", "both subjects", "background", "CLIP-T")
STYLED_COLUMNS = ("subject", "style", "both", "CLIP-I to subject", "CLIP-I to style", "CLIP-T")
REFERENCES = {"real": "real pictures", "base": "untouched base, class nouns"}


@dataclass(frozen=True)
class Claim:
    """`better` has the higher `figure`."""

    figure: str
    better: str
    worse: str
    source: str


MULTI = "Kumari et al., multi-concept"
CLAIMS: dict[str, tuple[Claim, ...]] = {
    TWO_SUBJECTS: (
        Claim("both colours", "joint", "sequential", f"{MULTI}: CLIP-I 0.706, 0.700"),
        Claim("both colours", "joint", "closed form", f"{MULTI}: CLIP-I 0.706, 0.695"),
        Claim("both colours", "sequential", "closed form", f"{MULTI}: CLIP-I 0.700, 0.695"),
        Claim("CLIP-T", "joint", "sequential", f"{MULTI}: 0.801, 0.797"),
        Claim("both colours", "closed form", "addition", "none: constrained against plain sum"),
        Claim("both colours", "joint", "addition", "none: joint against plain sum"),
    ),
    SUBJECT_IN_STYLE: (
        Claim("CLIP-I to subject", "ZipLoRA", "addition", "Shah et al., table 1: DINO 0.420, 0.357"),
        Claim("CLIP-I to style", "addition", "ZipLoRA", "Shah et al., table 1: 0.702, 0.699"),
        Claim("CLIP-T", "ZipLoRA", "addition", "Shah et al., table 1: 0.303, 0.275"),
        Claim("both", "ZipLoRA", "addition", "Shah et al.: preferred by 82.7 %"),
        Claim("CLIP-I to subject", "K-LoRA", "addition", "Ouyang et al.: better than direct addition"),
        Claim("CLIP-I to style", "K-LoRA", "addition", "Ouyang et al.: better than direct addition"),
        Claim("both", "K-LoRA", "addition", "Ouyang et al.: better than direct addition"),
    ),
}


def figures(cells: Cells, kind: str, way: str, name: str) -> Tensor:
    """Of all pairs and seeds."""
    key = f"{way}: {name}"
    found = [row[key] for (k, _, _), row in sorted(cells.items()) if k == kind and key in row]
    return torch.tensor(found, dtype=torch.float64)


def way_table(cells: Cells, kind: str) -> str:
    """A row per way, after what real pictures and the untouched base score."""
    total, done = len(COMBINATIONS[kind]) * len(SEEDS), sum(cell[0] == kind for cell in cells)
    pair = kind == TWO_SUBJECTS
    columns = PAIR_COLUMNS if pair else STYLED_COLUMNS
    single = [f"{name}, each by itself" for name in SINGLE] if pair else []
    rows = []
    ways = [*REFERENCES, *(["alone"] if pair else []), *WAYS[kind]]
    for way in ways:
        found = [figures(cells, kind, way, name) for name in columns]
        found += [_single(cells, kind, way, name) for name in SINGLE] if pair else []
        label = REFERENCES.get(way, "each adapter, not combined" if way == "alone" else way)
        rows.append([label, *(with_interval(values) if len(values) else "" for values in found)])
    return f"{done} of {total} cells.\n\n" + lines_of(["", *columns, *single], rows)


def _single(cells: Cells, kind: str, way: str, name: str) -> Tensor:
    """Mean over the two subjects, each asked for by itself."""
    both = [f"{way}: {name}, subject {n} of 2" for n in (1, 2)]
    rows = [row for (k, _, _), row in sorted(cells.items()) if k == kind and both[0] in row]
    return torch.tensor([sum(row[one] for one in both) / 2 for row in rows], dtype=torch.float64)


def claims(cells: Cells, kind: str) -> str:
    rows = []
    for claim in CLAIMS[kind]:
        first, second = (figures(cells, kind, way, claim.figure) for way in (claim.better, claim.worse))
        effect, said = verdict(first - second)
        rows.append([f"{claim.figure}: {claim.better} above {claim.worse}", claim.source, effect, said])
    return lines_of(["claim", "paper", "effect here (first less second)", "verdict"], rows)


def page(cells: Cells) -> str:
    return f"""## Two subjects in one scene

Two concepts of Custom Diffusion, small shapes in held-out colours, each by its token, beside or above each other ("a
<new1> circle to the left of a <new2> heart on a red background"); each half of a picture is judged by itself. *both
subjects*: the reader finds every attribute of both. The base draws pairs where they are asked for, but their shapes
only one time in four (see its card), so that *colours* decide: the subject's colour is among its half's, counted in
pixels; *both colours*: in both halves.
*each by itself*: the combined adapter asked for one of them. *joint*: trained together, twice the steps;
*sequential*: the second after the first, on the first's weights; *closed form*: `litp merge closed-form`;
*addition*: both adapters at once.

{way_table(cells, TWO_SUBJECTS)}

{claims(cells, TWO_SUBJECTS)}

![two subjects by way](two_subjects.png)

## A subject in a style

A subject's and a style's LoRA (DreamBooth-LoRA recipe) combined: "a sks critter on the beach in ktn style".
*subject*: share of its attributes, of those that the style leaves readable; *both*: that share in pictures of the
style, 0 elsewhere.

{way_table(cells, SUBJECT_IN_STYLE)}

{claims(cells, SUBJECT_IN_STYLE)}

![a subject in a style by way](subject_in_style.png)
"""
