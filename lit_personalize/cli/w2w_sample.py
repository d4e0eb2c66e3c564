"""`litp w2w sample`: new identities from the distribution of a corpus."""

from __future__ import annotations

import argparse

from lit_personalize.cli.console import configure_logging, emit
from lit_personalize.cli.w2w_space import add_output, add_space, open_space


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="litp w2w sample", description="Draw new adapters: coefficients from the corpus's normal distribution."
    )
    add_space(parser, "unused, but names the base")
    parser.add_argument("--count", type=int, default=1, help="how many; each has a folder of its own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spread", type=float, default=1.0, help="factor of the corpus's deviations")
    parser.add_argument("--components", type=int, help="drawn; the others stay 0; default: 1000, or all if fewer")
    add_output(parser, "folder for SEED-NUMBER/ with LoRA files and w2w.json")
    return parser


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    configure_logging()
    from lit_personalize.weights2weights.sampling import draw

    opened = open_space(options)
    space = opened.space
    drawn = draw(space, options.count, options.seed, options.spread, options.components)
    records = []
    for number, coefficients in enumerate(drawn):
        told = {"w2w": "sample", "seed": options.seed, "number": number, "spread": options.spread}
        folder = options.out / f"{options.seed}-{number:04d}"
        weights = space.weights_of(coefficients)
        records.append(opened.write_weights(weights, coefficients, folder, told, number == 0))
    if options.json:
        emit({"components": drawn.shape[1], "adapters": records}, True)
    else:
        print(*(record["folder"] for record in records), sep="\n")
    return 0
