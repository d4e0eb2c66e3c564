"""`litp runs ls|show|compare`: what run directories say; no server, no torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lit_personalize.cli.console import add_json, emit

PLACES_HELP = "names or patterns of runs in --root ('sweep-*'), run directories, or folders of them; default: all"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="litp runs", description="List runs, show one, or compare some.")
    verbs = parser.add_subparsers(dest="what", required=True, metavar="ls|show|compare")
    ls = verbs.add_parser("ls", help="one line per run", description="List runs: state, step, loss, job, size.")
    ls.add_argument("places", nargs="*", metavar="RUN|FOLDER", help=PLACES_HELP)
    show = verbs.add_parser("show", help="state, files and newest whole checkpoint of a run")
    show.add_argument("run", help="its directory, or its name in --root")
    compare = verbs.add_parser(
        "compare", help="differences of some runs", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Compare runs: configuration keys that differ, figures of metrics.csv and of evaluation.json\n"
        "(litp evaluate -o RUN/evaluation.json) at their last and best, exported tensors, environments.",
    )  # fmt: skip
    compare.add_argument("places", nargs="*", metavar="RUN|FOLDER", help=PLACES_HELP)
    compare.add_argument("--by", default="", metavar="FIGURE", help="sort by the best of a figure, such as loss")
    compare.add_argument("--html", type=Path, metavar="FILE", help="also write a page: curves over each other, samples")
    for verb in (ls, show, compare):
        verb.add_argument("--root", type=Path, default=Path("runs"), help="folder of runs; default: runs")
        add_json(verb)
    return parser


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    return {"ls": _ls, "show": _show, "compare": _compare}[options.what](options)


def _ls(options: argparse.Namespace) -> int:
    from lit_personalize.run_state import find_runs, state_of

    states = [state_of(run) for run in find_runs(options.places, options.root)]
    if options.json:
        emit({"runs": [state.as_dict() for state in states]}, True)
        return 0
    from lit_personalize.cli.run_tables import console, runs_table

    console().print(runs_table(states))
    return 0


def _show(options: argparse.Namespace) -> int:
    from lit_personalize.cli.console import run_report, where_things_are
    from lit_personalize.errors import DataError
    from lit_personalize.run_state import STATES, find_runs, is_run, state_of

    if Path(options.run).is_dir() and not is_run(Path(options.run)):
        raise DataError(f"{options.run} is not a run directory: it has no config.yaml")
    run, *others = find_runs([options.run], options.root)
    if others:
        raise DataError(f"{options.run} names {len(others) + 1} runs; litp runs ls lists them, show takes one")
    state, report = state_of(run), run_report(run.path)
    if options.json:
        emit(state.as_dict() | report, True)
        return 0
    import sys

    from lit_personalize.cli.run_tables import ago, shown
    from lit_personalize.gallery.pages import size

    told: dict[str, Any] = {"state": f"{state.state}: {STATES[state.state]}"}
    told["step"] = f"{state.step} of {state.steps}" if state.steps else state.step
    told |= {"loss": shown(state.loss), "newest checkpoint": state.checkpoint or "none"}
    if report["step"] != state.step:
        told["newest whole checkpoint"] = f"step {report['step']}: later ones do not hold their hashes"
    told |= {"job": state.job or "none", "size": size(state.bytes), "updated": ago(state.updated)}
    if state.state == "running":
        told["owner"] = run.owner_line()
    emit(told, False)
    where_things_are(run.path, sys.stdout)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from lit_personalize.errors import UsageError
    from lit_personalize.run_comparison import compare
    from lit_personalize.run_state import find_runs

    runs = find_runs(options.places, options.root)
    if len(runs) < 2:
        raise UsageError(f"there is one run to compare, {runs[0].path}; name two, or a pattern such as 'sweep-*'")
    made = compare(runs, options.by)
    if options.html:
        from lit_personalize.gallery.comparison_page import write_comparison

        write_comparison(made, options.html)
    if options.json:
        emit(made.as_dict() | ({"page": str(options.html)} if options.html else {}), True)
        return 0
    from lit_personalize.cli.run_tables import print_comparison

    print_comparison(made, options.by)
    if options.html:
        print(options.html)
    return 0
