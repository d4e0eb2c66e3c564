"""`litp w2w edit`: change an attribute of an adapter along the direction that a corpus's labels give."""

from __future__ import annotations

import argparse
from typing import Any

from lit_personalize.cli.console import configure_logging, emit
from lit_personalize.cli.w2w_space import POINT, add_directions, add_output, add_space, direction_of, open_space


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="litp w2w edit",
        description="Change an attribute of an adapter. Only what lies along the direction is added, so whatever else "
        "the adapter is stays, also outside of the space.",
    )
    add_space(parser, "gives the labels, and its adapters whole")
    parser.add_argument("adapter", metavar="ADAPTER", help=POINT)
    parser.add_argument("--along", required=True, metavar="LABEL", help="attribute that changes")
    parser.add_argument("--by", type=float, nargs="+", default=[1.0], metavar="ALPHA",
                        help="how far, in the corpus's deviations along the direction; several give a folder "
                        "each")  # fmt: skip
    parser.add_argument("--without", default="", metavar="LABEL,...", help="attributes taken out of the direction")
    parser.add_argument("--removal", choices=("sequential", "orthogonal"), default="sequential",
                        help="one after the other, as the paper, or all that they span")  # fmt: skip
    add_directions(parser)
    parser.add_argument("--project", action="store_true", help="replace the adapter by its projection first")
    add_output(parser, "folder for LoRA files and w2w.json; of several --by for by_ALPHA/")
    return parser


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    configure_logging()
    from lit_personalize.weights2weights.directions import without
    from lit_personalize.weights2weights.points import point_of

    opened = open_space(options)
    space, labels = opened.space, opened.labels()
    direction = direction_of(opened, labels, options.along)
    if others := [name.strip() for name in options.without.split(",") if name.strip()]:
        removed = [direction_of(opened, labels, name) for name in others]
        direction = without(direction, removed, space.coefficients, options.removal)
    point = point_of(space, options.adapter, opened.base, opened.corpus, options.force)
    row = space.unproject(point.coefficients) if options.project else point.row
    told: dict[str, Any] = {
        "w2w": "edit", "adapter": point.name, "along": direction.name, "without": list(direction.removed),
        "method": direction.method, "components": len(direction.vector), "deviation": direction.deviation,
        "held_out": direction.held_out, "kept": direction.kept, "residual": point.residual,
        "projected": options.project,
    }  # fmt: skip
    records = []
    for number, by in enumerate(options.by):
        folder = options.out if len(options.by) == 1 else options.out / f"by_{by:g}"
        records.append(opened.write(row + direction.step(space, by), folder, {**told, "by": by}, number == 0))
    if options.json:
        emit({"classes": direction.classes, "counts": list(direction.counts), "adapters": records}, True)
        return 0
    measure = "balanced accuracy" if direction.classes else "correlation"
    held_out = f"{measure} {direction.held_out:.3f} on adapters held out"
    print(f"{direction.name}: {held_out}, in {told['components']} components")
    if others:
        print(f"without {', '.join(others)}: {direction.kept:.0%} of the direction is left")
    if point.residual:
        lost = "was dropped" if options.project else "is kept"
        print(f"{point.name}: {point.residual:.1%} of it lie outside of the space, which {lost}")
    print(*(record["folder"] for record in records), sep="\n")
    return 0
