"""`litp w2w merge`: between identities, and with a LoRA from outside of the space beside them."""

from __future__ import annotations

import argparse
from pathlib import Path

from lit_personalize.cli.console import configure_logging, emit
from lit_personalize.cli.w2w_space import POINT, add_output, add_space, open_space


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="litp w2w merge", description="Mix adapters by their coefficients, and add LoRAs from elsewhere."
    )
    add_space(parser, "gives its adapters whole")
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help=POINT)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--weights", type=float, nargs="+", help="of the adapters; default: equal, with sum 1")
    how.add_argument("--at", type=float, nargs="+", metavar="SHARE",
                     help="of two adapters, shares of the second; several give a folder each")  # fmt: skip
    parser.add_argument("--add", action="append", default=[], metavar="FILE[@STRENGTH]",
                        help="a LoRA outside of the space, whose ranks stand beside; may be repeated")  # fmt: skip
    parser.add_argument("--project", action="store_true", help="leave out what lies outside of the space")
    add_output(parser, "folder for LoRA files and w2w.json; of several --at for at_SHARE/")
    return parser


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    configure_logging()
    from lit_personalize.errors import UsageError
    from lit_personalize.export.loading import exports_of, read_adapter
    from lit_personalize.sampling.cells import split_strengths
    from lit_personalize.weights2weights.merging import beside, combine
    from lit_personalize.weights2weights.points import of_row, point_of, weights_of_row

    names = options.adapters
    if options.at is not None and len(names) != 2:
        raise UsageError(f"--at goes from one adapter to another: name two, not {len(names)}")
    shares = [[1 - share, share] for share in options.at or []] or [options.weights or [1 / len(names)] * len(names)]
    opened = open_space(options)
    space = opened.space
    points = [point_of(space, name, opened.base, opened.corpus, options.force) for name in names]
    others = []
    for entry in options.add:
        path, strength, blocks = split_strengths(entry)
        if blocks:
            raise UsageError(f"{entry}: --add takes one strength, not those of blocks")
        others.append((read_adapter(exports_of(Path(path)), opened.base, options.force), strength))
    records = []
    for number, weights in enumerate(shares):
        row = combine(space, points, weights)
        coefficients = of_row(space, "", row).coefficients
        merged = weights_of_row(space, space.unproject(coefficients) if options.project else row)
        for other, strength in others:
            merged = beside(merged, other, strength)
        folder = options.out if len(shares) == 1 else options.out / f"at_{weights[1]:g}"
        told = {
            "w2w": "merge", "adapters": names, "weights": weights, "added": options.add,
            "residuals": [point.residual for point in points], "projected": options.project,
        }  # fmt: skip
        records.append(opened.write_weights(merged, coefficients, folder, told, number == 0))
    if options.json:
        emit({"adapters": records}, True)
    else:
        print(*(record["folder"] for record in records), sep="\n")
    return 0
