"""`litp inspect`: keys, ranks, tokens and metadata of adapter files."""

from __future__ import annotations

import argparse
from pathlib import Path

from lit_personalize.cli.console import add_json, configure_logging, emit


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="litp inspect", description="Show what an adapter file holds.")
    parser.add_argument("file", type=Path)
    add_json(parser)
    options = parser.parse_args(arguments)
    configure_logging()
    from lit_personalize.export.inspect import inspect_file

    emit(inspect_file(options.file), options.json)
    return 0
