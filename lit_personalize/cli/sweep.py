"""`litp sweep`: one configuration over values of its keys, as an array of jobs, or here one run after the other."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lit_personalize.cli.console import JSON_HELP, add_json, emit
from lit_personalize.errors import UsageError

if TYPE_CHECKING:
    from lit_personalize.cli.slurm import Given
    from lit_personalize.run_state import RunState
    from lit_personalize.sweeps import Point, Sweep

ABOUT = f"""litp sweep --name S --over KEY=VALUE,... [--over ...] [options] ARGUMENTS OF litp fit
       litp sweep status S [--root ROOT] [--json]

Runs S-000, S-001 and so on, one for each combination of the values, as one Slurm array. The same command again submits
what is not finished. Every value is checked before anything is written. Then: litp runs compare 'S-*' --by loss

  --over KEY=VALUES   model.init_args.adapters.0.init_args.rank=4,8,16 or seed=0..4, both ends within; may be repeated.
                      seed stands for those of model and data
  --over-file FILE    YAML: a mapping of keys to lists, or a list of mappings, one for each run
  --zip               the first value of every key, then the second, instead of all combinations
  --here              train here, one after the other, instead of submitting
  --at-once N         tasks of the array that run at the same time, at most
  --dry-run           check, print table and job script, and write nothing
  --profile NAME, --slurm.KEY VALUE   as for litp slurm submit
  --json              {JSON_HELP}
"""
STOPPING = (75, 130)
"""Exit codes of a run that was asked to stop, after which no further one begins."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="litp sweep", usage=ABOUT, add_help=False, allow_abbrev=False)
    parser.add_argument("--over", action="append", default=[])
    parser.add_argument("--over-file", type=Path)
    parser.add_argument("--zip", action="store_true")
    parser.add_argument("--here", action="store_true")
    parser.add_argument("--at-once", type=int, default=0)
    parser.add_argument("--dry-run", action="store_true")
    add_json(parser)
    return parser


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {ABOUT}", end="")
        return 0 if arguments else 2
    if arguments[0] == "status":
        return _status(arguments[1:])
    options, rest = build_parser().parse_known_args(arguments)
    from lit_personalize.cli.slurm import Given
    from lit_personalize.run_directory import RunDirectory
    from lit_personalize.sweeps import Sweep, points_in, points_of, values_of

    axes = [values_of(text) for text in options.over]
    points = points_in(options.over_file, options.zip, axes) if options.over_file else points_of(axes, options.zip)
    given = Given(rest)
    RunDirectory(given.root, given.name)  # refuses a name that is none for a directory
    sweep = Sweep(Path(given.root).absolute(), given.name, points)
    job = None if options.here else _job_options(given, options.at_once)
    base, overrides, recipe = _checked(sweep, given.arguments)
    exists = (sweep.path / "table.json").is_file()
    if exists:
        sweep.refuse_another(yaml.safe_load(base))
    states = _states(sweep)
    waiting = _queued(sweep)
    todo = [task for task, state in enumerate(states) if not _is_done(state) and task not in waiting]
    more = ["--recipe", recipe] if recipe else []
    if options.dry_run:
        script = _script(sweep, job, todo, options.at_once, more) if job and todo else ""
        _report(sweep, states, waiting, options.json, {"dry_run": True, "script": script})
        if script and not options.json:
            print(script.rstrip("\n"))
        return 0
    if not exists:
        sweep.write(base, overrides)
    told: dict[str, Any] = {}
    code = 0
    if not todo:
        print(f"sweep {sweep.name}: nothing to do, its {len(points)} runs are finished or under way", file=sys.stderr)
    elif options.here:
        code = _train_here(sweep, todo, more)
        states = _states(sweep)
    elif job:
        from lit_slurm import jobs

        folder = jobs.folder_of(sweep.root, sweep.name)
        submitted = jobs.submit(jobs.write(_script(sweep, job, todo, options.at_once, more), folder), sweep.pattern)
        print(f"job {submitted.job}: {len(todo)} tasks, {submitted.script}", file=sys.stderr)
        told = {"job": submitted.job, "submitted": todo}
        waiting = {task: f"{submitted.job}_{task}" for task in todo} | waiting
    _report(sweep, states, waiting, options.json, told)
    return code


def _job_options(given: Given, at_once: int) -> Any:
    """What the array asks of Slurm.

    Raises:
        OptionError: An unknown key or a wrong value.
        UsageError: The configuration names an array of its own.
    """
    from lit_slurm.options import options_of, profile

    options = options_of(profile(given.profile) if given.profile else None, *given.sections, given.overrides)
    if options.array:
        raise UsageError("slurm.array: a sweep makes its own array of what is to be done; use --at-once for a limit")
    if at_once < 0:
        raise UsageError(f"--at-once must be at least 1, not {at_once}")
    return options


def _checked(sweep: Sweep, arguments: list[str]) -> tuple[str, list[dict[str, Any]], str]:
    """The resolved base, each task's override, and the recipe; the parser of `litp fit` has accepted all of them.

    Raises:
        UsageError: A key or value is none, and which it is.
    """
    from lit_personalize.configuration import parse, resolved_text
    from lit_personalize.sweeps import override_of

    parser, config = parse(arguments)
    base = resolved_text(parser, config)
    whole = yaml.safe_load(base)
    overrides = [override_of(whole, point, sweep.run_name(task)) for task, point in enumerate(sweep.points)]
    with tempfile.TemporaryDirectory(prefix="litp-sweep-") as name:
        folder = Path(name)
        sweep.write(base, overrides, folder)
        for task in _telling(sweep.points):
            try:
                parse(sweep.arguments(task, folder))
            except UsageError as error:
                values = ", ".join(f"{key}={value}" for key, value in sweep.points[task].items())
                raise UsageError(f"--over {values}: {error}") from error
    return base, overrides, str(config.recipe or "")


def _telling(points: list[Point]) -> list[int]:
    """Tasks in which every value of every key stands at least once."""
    seen: set[str] = set()
    found = []
    for task, point in enumerate(points):
        values = {f"{key}={value!r}" for key, value in point.items()}
        if not values <= seen:
            found.append(task)
            seen |= values
    return found


def _states(sweep: Sweep) -> list[RunState | None]:
    """Of each task's run; None where there is none yet."""
    from lit_personalize.run_state import is_run, state_of

    runs = [sweep.run(task) for task in range(len(sweep.points))]
    return [state_of(run) if is_run(run.path) else None for run in runs]


def _is_done(state: RunState | None) -> bool:
    return state is not None and state.state in ("finished", "running")


def _queued(sweep: Sweep) -> dict[int, str]:
    """Task -> job and state of what Slurm has of this sweep now; nothing where nothing was submitted.

    Raises:
        SlurmError: Something was submitted, and no Slurm answers.
    """
    from lit_slurm import jobs

    mine = [job for job in jobs.submitted(sweep.root) if job.run == sweep.pattern]
    found = jobs.states(job.job for job in mine) if mine else {}
    tasks = [state for states in found.values() for state in states]
    return {int(state.job.partition("_")[2]): f"{state.job} {state.state}" for state in tasks if "_" in state.job}


def _script(sweep: Sweep, job: Any, todo: list[int], at_once: int, more: list[str]) -> str:
    from dataclasses import replace

    from lit_personalize.sweeps import indices
    from lit_slurm import jobs
    from lit_slurm.render import render

    array = replace(job, array=indices(todo) + (f"%{at_once}" if at_once else ""))
    folder = jobs.folder_of(sweep.root, sweep.name)
    return render(array, sweep.pattern, [*sweep.arguments(), *more], folder)


def _train_here(sweep: Sweep, todo: list[int], more: list[str]) -> int:
    """Train some tasks in processes of their own; what fails does not keep the others from training.

    Returns:
        The first exit code that is not 0.
    """
    first = 0
    for number, task in enumerate(todo, 1):
        values = " ".join(f"{key}={value}" for key, value in sweep.points[task].items())
        print(f"sweep {sweep.name}: {number} of {len(todo)}: {sweep.run_name(task)} {values}", file=sys.stderr)
        code = _train(["fit", *sweep.arguments(task), *more])
        first = first or code
        if code in STOPPING or code < 0:
            return code if code > 0 else 128 - code
        if code:
            print(f"sweep {sweep.name}: {sweep.run_name(task)} ended with exit code {code}", file=sys.stderr)
    return first


def _train(arguments: list[str]) -> int:
    """`litp` in a process of its own, which is told of every signal that comes here, and not left alone."""
    from lit_personalize.stop_signals import NOTICES

    command = [sys.executable, "-m", "lit_personalize", *arguments]
    child = subprocess.Popen(command, stdout=2)  # results are those of the sweep, on stdout alone
    before = {notice: signal.signal(notice, lambda which, _: child.send_signal(which)) for notice in NOTICES}
    # Ctrl-C reaches the child by itself; this process waits until it has saved.
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _status(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="litp sweep status", description="Show the runs of a sweep.")
    parser.add_argument("name")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder of runs; default: runs")
    add_json(parser)
    options = parser.parse_args(arguments)
    from lit_personalize.sweeps import read
    from lit_slurm.jobs import SlurmError

    sweep = read(options.root.absolute(), options.name)
    waiting: dict[int, str] = {}
    try:
        waiting = _queued(sweep)
    except SlurmError as error:
        print(f"without the queue: {error}", file=sys.stderr)
    _report(sweep, _states(sweep), waiting, options.json, {})
    return 0


def _report(
    sweep: Sweep, states: list[RunState | None], waiting: dict[int, str], as_json: bool, told: dict[str, Any]
) -> None:
    rows: list[dict[str, Any]] = []
    for task, (point, state) in enumerate(zip(sweep.points, states, strict=True)):
        where = "queued" if task in waiting else "not started"
        row: dict[str, Any] = {"task": task, "run": sweep.run_name(task), "values": point}
        row["state"] = state.state if state else where
        if state and state.state not in ("finished", "running") and task in waiting:
            row["state"] = f"queued again, {state.state}"
        row |= {"step": state.step if state else 0, "steps": state.steps if state else None}
        row |= {"loss": state.loss if state else None, "job": waiting.get(task) or (state.job if state else None)}
        rows.append(row)
    if as_json:
        emit({"sweep": sweep.name, "path": str(sweep.path), **told, "tasks": rows}, True)
        return
    from rich.table import Table

    from lit_personalize.cli.run_tables import NONE, coloured, console, short_names, shown

    labels = short_names(dict.fromkeys(key for point in sweep.points for key in point))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("run", *labels.values(), "state", "step", "loss", "job"):
        table.add_column(title, overflow="fold")
    for row in rows:
        values = [shown(row["values"].get(key)) for key in labels]
        step = f"{row['step']}/{row['steps']}" if row["steps"] else str(row["step"])
        table.add_row(row["run"], *values, coloured(row["state"]), step, shown(row["loss"]), row["job"] or NONE)
    console().print(table)
