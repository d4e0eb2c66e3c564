"""A job script of plain sbatch, to be read and changed by hand: from options and arguments of fit or bank run."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lit_slurm.options import OptionError, Options

TEMPLATE = Path(__file__).parent / "templates" / "fit.sbatch"
TASK = "{task}"
"""Stands for the index of an array's task in the run's name and in any other argument; `{task:03}` has three digits."""
_TASK = re.compile(r"\{task(?::0(\d))?\}")


def of_task(text: str, index: int | str) -> str:
    """A name or argument as one task of an array has it."""
    return _TASK.sub(lambda found: str(index).zfill(int(found[1] or 0)), text)


def names_task(text: str) -> bool:
    """Whether each task of an array has another one."""
    return _TASK.search(text) is not None


def render(
    options: Options, name: str, arguments: Sequence[str], logs: Path | str = ".", verb: Sequence[str] = ("fit",)
) -> str:
    """The script that trains a run, and queues itself again when it is stopped.

    Args:
        name: Of the run; with `array` it holds "{task}", so that no two tasks share a run directory.
        arguments: Of `litp fit`, `--name` among them.
        logs: Folder of the job's output; it must exist when the job starts.
        verb: Of litp; ("bank", "run") takes one task with at most one GPU.

    Raises:
        OptionError: An array of one run, or "{task}" without an array; a bank with several tasks in a job.
    """
    if options.array and not names_task(name):
        raise OptionError(f"slurm.array starts several runs: put {TASK} into the run's name, such as {name}-{TASK}")
    if not options.array and any(map(names_task, arguments)):
        raise OptionError(f"{TASK} is the index of an array's task: give slurm.array, such as 0-7")
    tasks = max(options.gpus, 1)
    shape = [f"--trainer.num_nodes={options.nodes}", f"--trainer.devices={tasks}"] if verb[0] == "fit" else []
    if not shape and (options.nodes, tasks) != (1, 1):
        raise OptionError(
            f"slurm.nodes {options.nodes} and slurm.gpus {options.gpus}: a bank's process has one GPU and no other to "
            "talk to; give slurm.gpus 1 and an array, such as 0-15"
        )
    command = options.command or f"{shlex.quote(sys.executable)} -m lit_personalize"
    parts = {
        "DIRECTIVES": "\n".join(f"#SBATCH {line}" for line in _directives(options, name, logs, tasks)),
        "TITLE": f"Run {name}; written by `litp slurm render`.",
        "ENVIRONMENT": "\n".join(f"export {key}={shlex.quote(value)}" for key, value in options.environment.items()),
        "SETUP": "\n".join([*(f"module load {shlex.quote(m)}" for m in options.modules), *options.setup]),
        "SCRATCH": options.scratch or "${TMPDIR:-/tmp}",
        "SRUN": f" --container-image={shlex.quote(options.container)}" if options.container else "",
        "COMMAND": " ".join([command, *verb, *(_argument(a) for a in (*shape, *arguments))]),
        "RESTARTS": str(options.restarts if options.requeue else 0),
    }
    text = re.sub(r"@([A-Z]+)@", lambda found: parts[found[1]], TEMPLATE.read_text(encoding="utf-8"))
    return re.sub(r"\n{3,}", "\n\n", text)


def _directives(options: Options, name: str, logs: Path | str, tasks: int) -> list[str]:
    label = re.sub(r"[^A-Za-z0-9_.-]+", "-", _TASK.sub("", name)).strip("-") or "litp"
    lines = [
        f"--job-name={label}", "--export=NONE", "--open-mode=append",
        f"--output={logs}/{'%A_%a' if options.array else '%j'}.log",
        f"--nodes={options.nodes}", f"--ntasks-per-node={tasks}",
    ]  # fmt: skip
    if options.gpus:
        lines.append(f"--gpus-per-node={options.gpus}")
    if options.cpus:
        lines.append(f"--cpus-per-task={options.cpus}")
    if options.memory:
        lines.append(f"--mem={options.memory}")
    for key in ("partition", "account", "qos", "reservation", "constraint", "time", "array"):
        if value := getattr(options, key):
            lines.append(f"--{key}={value}")
    if options.lead:
        lines.append(f"--signal={options.signal}@{options.lead}")
    lines.append("--requeue" if options.requeue else "--no-requeue")
    return [*lines, *options.extra]


def _argument(argument: str) -> str:
    """Quoted for the shell, but for the array's index."""
    parts, end = [], 0
    for found in _TASK.finditer(argument):
        index = f'$(printf %0{found[1]}d "$SLURM_ARRAY_TASK_ID")' if found[1] else "$SLURM_ARRAY_TASK_ID"
        before = argument[end : found.start()]
        parts += [shlex.quote(before) if before else "", f'"{index}"']
        end = found.end()
    rest = argument[end:]
    return "".join([*parts, shlex.quote(rest) if rest else ""]) or "''"
