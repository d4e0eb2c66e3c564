"""`litp runs ls|show`: the run directories below a folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from lit_personalize.cli.console import add_json, emit, report_run


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="litp runs", description="List runs, or show one.")
    verbs = parser.add_subparsers(dest="what", required=True, metavar="ls|show")
    ls = verbs.add_parser("ls", help="one line per run")
    ls.add_argument("root", type=Path, nargs="?", default=Path("runs"))
    add_json(ls)
    show = verbs.add_parser("show", help="files and newest checkpoint of a run")
    show.add_argument("run", type=Path)
    add_json(show)
    options = parser.parse_args(arguments)
    from lit_personalize.checkpoints import find_complete
    from lit_personalize.errors import DataError

    if options.what == "show":
        if not (options.run / "config.yaml").is_file():
            raise DataError(f"{options.run} is not a run directory: it has no config.yaml")
        report_run(options.run, options.json)
        return 0
    if not options.root.is_dir():
        raise DataError(f"there is no folder {options.root}; name the folder that holds the runs")
    rows = []
    for folder in sorted(p.parent for p in options.root.glob("*/config.yaml")):
        found = find_complete(folder / "checkpoints")
        exports = sorted(p.name for p in (folder / "exports").glob("*.safetensors"))
        rows.append({"name": folder.name, "step": found.step if found else 0, "exports": exports})
    if options.json:
        emit({"runs": rows}, True)
    for row in () if options.json else rows:
        print(f"{row['name']:<24} step {row['step']:<8} {len(row['exports'])} adapter files")  # type: ignore[arg-type]
    return 0
