"""`litp merge interpolate`: the adapter between two adapters, at a share alpha."""

from __future__ import annotations

import argparse
from pathlib import Path

from lit_personalize.cli.console import base_of, configure_logging
from lit_personalize.cli.merge_arithmetic import add_output, show


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="litp merge interpolate",
        description="The adapter between two: changes (1 - alpha) of the first and alpha of the second; rows of their "
        "tokens mixed alike, at the mixed norm. For the text states of two prompts: litp sample A B --mix 0 0.5 1.",
    )
    parser.add_argument("adapters", nargs=2, metavar="FILE|FOLDER", help="adapters, or runs")
    parser.add_argument("--alpha", type=float, default=0.5, help="share of the second, in [0, 1]")
    parser.add_argument("--token", default="", help="name of the mixed token; default: the first adapter's")
    add_output(parser)
    return parser


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    configure_logging()
    from lit_personalize.export.loading import exports_of, read_adapter
    from lit_personalize.merging.arithmetic import Energy
    from lit_personalize.merging.interpolation import interpolate
    from lit_personalize.merging.sources import matrices_only
    from lit_personalize.merging.writing import MergeReport, check_output, write_merged

    places = [exports_of(Path(given)) for given in options.adapters]
    check_output(options.output, places, options.formats)
    base = base_of(options)
    pair = [matrices_only(read_adapter(place, base, options.force), str(place)) for place in places]
    weights = interpolate(pair[0], pair[1], options.alpha, options.token)
    shares = zip(places, pair, (1 - options.alpha, options.alpha), strict=True)
    named = [{"name": str(place), "strength": share, "layers": len(own.layers())} for place, own, share in shares]
    report = MergeReport("interpolate", str(options.output), named, options={"alpha": options.alpha})
    write_merged(weights, Energy(), report, base, options.formats, not options.no_verify, options.prompt)
    show(report, options.json)
    return 0
