"""`litp profile`: where a training step's time goes, what kernels take, and what their compiler makes of them."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from lit_personalize.atomic import replacing, write_text
from lit_personalize.cli.console import add_json, configure_logging, emit
from lit_personalize.errors import UsageError


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="litp profile", description="Measure kernels, steps and compiles.")
    parts = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    compiles = parts.add_parser(
        "compile",
        help="registers, spills, shared memory and occupancy of every kernel; needs no GPU",
        description="Compile every form of every kernel for sm_80 and sm_90 and show what it takes. Needs no GPU. "
        "Exit code 4 if one spills, takes too much shared memory or multiplies without tensor cores.",
    )
    compiles.add_argument("--arch", type=int, action="append", metavar="80|90", help="only this architecture")
    compiles.add_argument("--only", action="append", metavar="OPERATOR", help="only this operator")
    compiles.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16", help="of tensors (default: bf16)")
    compiles.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    compiles.add_argument("--out", type=Path, metavar="DIR", help="also write compile[-fp16]-triton-VERSION.json there")
    add_json(compiles)
    kernels = parts.add_parser(
        "kernels",
        help="bytes, FLOPs, time and share of the limit of every operator at real sizes",
        description="Show what every operator moves and computes at the sizes of SD1.5@512 and SDXL@1024, and the "
        "limit that this sets (modelled); on an NVIDIA GPU also its time, forward and backward, beside plain torch "
        "and what others compute it with. With --out, kernels.json and a roofline picture kernels.png. With --tune, "
        "measure instead which path and which tile is fastest on this GPU, and write the table that kernels are chosen "
        "by; what is there is kept, so the same command goes on.",
    )
    kernels.add_argument("--batch", type=int, help="pictures in a batch (default: 1; with --tune 1, 2, 4, 8 and 16)")
    kernels.add_argument("--tune", action="store_true", help="measure this GPU's table instead; needs the GPU")
    kernels.add_argument(
        "--table",
        type=Path,
        metavar="DIR",
        help="where --tune writes GPU-NAME.json (default: LIT_KERNELS_TABLES, else the package's own folder)",
    )
    kernels.add_argument("--only", action="append", metavar="OPERATOR", help="only this operator")
    kernels.add_argument("--out", type=Path, metavar="DIR", help="write kernels.json and kernels.png there")
    add_json(kernels)
    step = parts.add_parser(
        "step",
        help="where a training step's time goes, by phase, layer and operator",
        description="Train some steps of a configuration and show where their time goes; all further options are those "
        "of litp fit. Writes step.json, step.png and trace.json.gz into the run's folder profile/ and nothing else.",
    )
    step.add_argument("--steps", type=int, default=10, help="timed steps (default: 10)")
    add_json(step)
    options, rest = parser.parse_known_args(arguments)
    if rest and options.what != "step":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    configure_logging()
    if options.what == "kernels":
        return _kernels(options)
    return _step(options, rest) if options.what == "step" else _compile(options)


def _kernels(options: argparse.Namespace) -> int:
    from lit_personalize.report.roofline import BATCHES, draw, measured, table, tuned

    if options.tune:
        if options.out is not None:
            raise UsageError("--tune writes a table and no report: use --table in place of --out")
        batches = BATCHES if options.batch is None else (options.batch,)
        file, found = tuned(batches, options.only, options.table)
        entries = []
        for entry in found:
            entries.append(asdict(entry))
            print(f"{entry.operator} {entry.sizes}: {entry.path} {entry.tiles or ''}", file=sys.stderr, flush=True)
        emit({"table": str(file), "entries": entries if options.json else len(entries)}, options.json)
        return 0
    if options.table is not None:
        raise UsageError("--table goes with --tune")
    report = measured(1 if options.batch is None else options.batch, options.only)
    if options.json:
        emit(report, True)
    else:
        print(table(report))
    if options.out is not None:
        write_text(options.out / "kernels.json", json.dumps(report, indent=1) + "\n")
        with replacing(options.out / "kernels.png") as temporary:
            draw(report, temporary)
    return 0


def _step(options: argparse.Namespace, rest: list[str]) -> int:
    from lit_personalize.profiling import profile_step, table
    from lit_personalize.ranks import is_rank_zero

    if options.steps < 2:
        raise UsageError(f"--steps must be at least 2, not {options.steps}")
    report, folder = profile_step(rest, options.steps)
    if not is_rank_zero():
        return 0
    if options.json:
        emit(report, True)
    else:
        print(table(report))
        print(f"\n{folder}: step.json, step.png, trace.json.gz")
    return 0


def _compile(options: argparse.Namespace) -> int:
    from lit_kernels import compiling

    if importlib.util.find_spec("triton") is None:
        raise UsageError("Triton is not installed: pip install triton (there is none but for Linux)")
    for given, known, what in (
        (options.arch, compiling.ARCHITECTURES, "architecture"),
        (options.only, compiling.OPERATORS, "operator"),
    ):
        if wrong := [value for value in given or () if value not in known]:
            raise UsageError(f"unknown {what} {wrong[0]!r}; there are {', '.join(map(str, known))}")
    if not options.json:
        print(compiling.HEADER, flush=True)
    made = []
    operators, architectures = options.only or compiling.OPERATORS, options.arch or compiling.ARCHITECTURES
    for one in compiling.compile_all(operators, architectures, max(1, options.jobs), options.dtype):
        made.append(one)
        if not options.json:
            print(compiling.line_of(one), flush=True)
    report = compiling.as_dict(made)
    if options.json:
        emit(report, True)
    if options.out is not None:
        write_text(options.out / compiling.results_name(options.dtype), json.dumps(report, indent=1) + "\n")
    bad = [one for one in made if one.faults]
    for one in bad:
        print(f"{one.name}, {one.config}, {one.arch}: {'; '.join(one.faults)}", file=sys.stderr)
    return 4 if bad else 0
