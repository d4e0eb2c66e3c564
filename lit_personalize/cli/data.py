"""`litp data check|sheet`: what a configuration's pictures and captions become."""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from pathlib import Path

log = logging.getLogger(__name__)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="litp data", description="Check or show the data of a configuration.")
    verbs = parser.add_subparsers(dest="what", required=True, metavar="check|sheet")
    for name, text in (("check", "read every file and count what is used"), ("sheet", "draw the first training views")):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("-c", "--config", action="append", required=True, help="YAML file or recipe; may be repeated")
        verb.add_argument("--json", action="store_true")
        default = Path("sheet.png" if name == "sheet" else "manifest.jsonl")
        verb.add_argument("-o", "--output", type=Path, default=default)
    options = parser.parse_args(arguments)
    from lit_personalize.cli.console import configure_logging, emit

    configure_logging()
    from lit_personalize.configuration import instantiate, parse

    given = [part for config in options.config for part in ("-c", config)]
    parser_, config = parse(given)
    del config["model"]  # reading pictures needs no base
    data = instantiate(parser_, config).data
    for later in [r for r in data.regularization if r.generate]:
        log.warning("left out: %d pictures of %r; `litp fit` draws them", later.generate, later.prompt)
        data.regularization.remove(later)
    try:
        data.setup("fit")
    finally:
        if options.what == "check":
            data.write_manifest(options.output)
    if options.what == "sheet":
        data.write_sheet(options.output)
        print(options.output)
        return 0
    fates = Counter(record.fate for record in data.records)
    emit({"files": len(data.records), **fates, "manifest": str(options.output)}, options.json)
    return 0
