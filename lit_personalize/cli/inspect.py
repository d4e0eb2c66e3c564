"""`litp inspect`: keys, ranks, tokens and metadata of adapter files."""

from __future__ import annotations

import argparse
from pathlib import Path


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="litp inspect", description="Show what an adapter file holds.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    from lit_personalize.cli.console import configure_logging, emit

    configure_logging()
    from lit_personalize.export.inspect import inspect_file

    emit(inspect_file(options.file), options.json)
    return 0
