"""`litp slurm render|submit|status`: runs as jobs of a cluster. Needs no torch, so that it runs on a login node."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from lit_personalize.cli.console import JSON_HELP
from lit_personalize.errors import UsageError
from lit_personalize.recipe_files import recipe_path
from lit_personalize.yaml_files import read_yaml

ABOUT = f"""litp slurm render|submit [--profile NAME] [--slurm.KEY VALUE ...] [--json] ARGUMENTS OF litp fit
       litp slurm render|submit bank DIR [--profile NAME] [--slurm.KEY VALUE ...] [--json] OPTIONS OF litp bank run
       litp slurm status [ROOT] [--json]

render prints the job script, submit writes it to ROOT/slurm/NAME/ and queues it, status lists jobs and steps.
Options of the job are the section slurm: of a -c file, over those of the profile ~/.config/litp/slurm/NAME.yaml;
--slurm.KEY VALUE wins over both. With slurm.array, {{task}} in the run's name and other arguments is the task's index.
Of a planned bank each task of an array 0-N begins with a share of the table of its own, and takes what others leave.

  --json       {JSON_HELP}
"""


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {ABOUT}\nslurm options:\n{_options_help()}")
        return 0 if arguments else 2
    what, rest, as_json = arguments[0], arguments[1:], "--json" in arguments
    if what == "status":
        return _status(rest)
    if what not in ("render", "submit"):
        raise UsageError(f"litp slurm {what}: there are render, submit and status")
    from lit_slurm import jobs
    from lit_slurm.options import options_of, profile
    from lit_slurm.render import render

    plain = [argument for argument in rest if argument != "--json"]
    bank = plain[:1] == ["bank"]
    given = Given(_of_bank(plain[1:]) if bank else plain)
    options = options_of(profile(given.profile) if given.profile else None, *given.sections, given.overrides)
    folder = jobs.folder_of(Path(given.root).absolute(), given.name)
    if bank:
        arguments = _bank_arguments(given, options.array)
        given.name += "-{task}" if options.array else ""
        text = render(options, given.name, arguments, folder, ("bank", "run"))
    else:
        text = render(options, given.name, given.arguments, folder)
    if what == "render":
        print(json.dumps({"script": text}, indent=2) if as_json else text.rstrip("\n"))
        return 0
    job = jobs.submit(jobs.write(text, folder), given.name)
    print(f"job {job.job}: {job.script}", file=sys.stderr)
    print(json.dumps(vars(job), indent=2) if as_json else job.job)
    return 0


def _of_bank(arguments: list[str]) -> list[str]:
    """A bank's folder as name and root of its jobs.

    Raises:
        UsageError: It was not planned.
    """
    from lit_personalize.bank.job_table import FILE

    folder = Path(arguments[0] if arguments else "").absolute()
    if not arguments or not (folder / FILE).is_file():
        raise UsageError(f"litp slurm bank DIR: {folder} is no planned bank; litp bank plan PEOPLE --out DIR makes one")
    return [*arguments[1:], "--name", folder.name, "--root", str(folder.parent)]


def _bank_arguments(given: Given, array: str) -> list[str]:
    """Of `litp bank run`, with a share of the table for each task where the array says how many there are."""
    own = given.arguments[: -len(("--name", given.name, "--root", given.root))]
    whole = re.fullmatch(r"0-(\d+)(%\d+)?", array)
    return [str(Path(given.root) / given.name), *(["--shard", f"{{task}}/{int(whole[1]) + 1}"] if whole else []), *own]


class Given:
    """What belongs to the job, taken out of the arguments of `litp fit`.

    Raises:
        UsageError: An option lacks its value, a file cannot be read, or the run has no name.
    """

    def __init__(self, arguments: list[str]):
        self.arguments: list[str] = []
        self.overrides: dict[str, Any] = {}
        self.sections: list[Any] = []
        self.profile, self.name, self.root = "", "", "runs"
        waiting = list(arguments)
        named: dict[str, str] = {}
        while waiting:
            key, equals, value = waiting.pop(0).partition("=")
            known = key in ("-c", "--config", "--name", "--root", "--profile") or key.startswith("--slurm.")
            if not known:
                self.arguments.append(f"{key}{equals}{value}")
                continue
            if not equals:
                if not waiting:
                    raise UsageError(f"{key} needs a value")
                value = waiting.pop(0)
            if key in ("-c", "--config"):
                self._read(value)
            elif key.startswith("--slurm."):
                name = key.removeprefix("--slurm.")
                self.overrides[name] = _typed(name, value)
            else:
                named[key] = value
        self.profile = named.get("--profile", "")
        self.name, self.root = named.get("--name", self.name), named.get("--root", self.root)
        if not self.name:
            raise UsageError("the run needs a name: --name NAME, or name: in the configuration")
        self.arguments += ["--name", self.name, "--root", str(Path(self.root).absolute())]

    def _read(self, name: str) -> None:
        path = recipe_path(name)
        found = read_yaml(path) or {}
        if not isinstance(found, dict):
            raise UsageError(f"{path} must hold options such as name: cat")
        self.sections.append(found.get("slurm"))
        self.name, self.root = str(found.get("name") or self.name), str(found.get("root") or self.root)
        self.arguments += ["-c", name if path != Path(name) else str(path.absolute())]


def _typed(name: str, value: str) -> Any:
    """A value of the command line, as YAML would have it where it is not text."""
    from lit_slurm.options import Options

    if isinstance(getattr(Options(), name, ""), str):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(f"--slurm.{name}: {value!r} is not YAML") from error


def _options_help() -> str:
    from dataclasses import fields

    from lit_slurm.options import Options

    usual = Options()
    return "\n".join(f"  {entry.name:<12} {json.dumps(getattr(usual, entry.name))}" for entry in fields(Options))


def _status(arguments: list[str]) -> int:
    from lit_personalize.cli.console import add_json, emit
    from lit_personalize.run_directory import RunDirectory
    from lit_slurm import jobs
    from lit_slurm.render import names_task, of_task

    parser = argparse.ArgumentParser(prog="litp slurm status", description="List jobs that were submitted here.")
    parser.add_argument("root", type=Path, nargs="?", default=Path("runs"))
    add_json(parser)
    options = parser.parse_args(arguments)
    known = jobs.submitted(options.root)
    if not known:
        raise UsageError(f"no job was submitted for runs in {options.root}; litp slurm submit does")
    now = jobs.states(job.job for job in known)
    rows = []
    for job in known:
        for state in now.get(job.job) or [jobs.State(job.job, "ended", "", 0, "")]:
            run = of_task(job.run, state.job.partition("_")[2]) if "_" in state.job else job.run
            step = None if names_task(run) else RunDirectory(options.root, run).newest_step()
            rows.append({"run": run, "step": step, **vars(state), "script": job.script})
    if options.json:
        emit({"jobs": rows}, True)
    for row in () if options.json else rows:
        reached = "" if row["step"] is None else f"step {row['step']}"
        again = f"restart {row['restarts']}" if row["restarts"] else ""
        line = f"{row['job']:<12} {row['run']:<24} {row['state']:<12} {reached:<12} {row['elapsed']:>10}"
        print(f"{line} {again} {row['reason']}".rstrip())
    return 0
