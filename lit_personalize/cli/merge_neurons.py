"""`litp merge neurons`: the union of several concepts' neurons as one file (Cones)."""

from __future__ import annotations

import argparse
from pathlib import Path

from lit_personalize.cli.console import base_of, configure_logging
from lit_personalize.cli.merge_arithmetic import add_output, show


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="litp merge neurons",
        description="The union of concept neurons: a weight that any of the files shuts off is zero.",
    )
    parser.add_argument("adapters", nargs="+", type=Path, metavar="FILE|RUN", help="two or more, with format neurons")
    add_output(parser)
    parser.set_defaults(formats=["neurons"])
    given = parser.parse_args(arguments)
    configure_logging()
    from lit_personalize.adapters.neuron_values import read_neurons
    from lit_personalize.export.loading import exports_of
    from lit_personalize.merging.arithmetic import Energy
    from lit_personalize.merging.neurons import unite
    from lit_personalize.merging.writing import MergeReport, check_output, write_merged

    check_output(given.output, [exports_of(place) for place in given.adapters], given.formats)
    base = base_of(given)
    names = [str(place) for place in given.adapters]
    read = [read_neurons(place, base, given.force) for place in given.adapters]
    found = unite(read, names)
    described = [
        {"name": name, "strength": 1.0, "layers": len(own.layers()), "neurons": number}
        for name, own, number in zip(names, read, found.counts, strict=True)
    ]
    report = MergeReport("neurons", str(given.output), described)
    report.extra = {"neurons": found.united, "shared by two or more": found.shared}
    write_merged(found.weights, Energy(), report, base, given.formats, not given.no_verify, given.prompt)
    show(report, given.json)
    return 0
