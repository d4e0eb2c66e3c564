"""A job script of plain sbatch, to be read and changed by hand: from options and the arguments of `litp fit`."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lit_slurm.options import OptionError, Options

TEMPLATE = Path(__file__).parent / "templates" / "fit.sbatch"
TASK = "{task}"
"""Stands for the index of an array's task in the run's name and in any other argument."""


def render(options: Options, name: str, arguments: Sequence[str], logs: Path | str = ".") -> str:
    """The script that trains a run, and queues itself again when it is stopped.

    Args:
        name: Of the run; with `array` it holds "{task}", so that no two tasks share a run directory.
        arguments: Of `litp fit`, `--name` among them.
        logs: Folder of the job's output; it must exist when the job starts.

    Raises:
        OptionError: An array of one run, or "{task}" without an array.
    """
    if options.array and TASK not in name:
        raise OptionError(f"slurm.array starts several runs: put {TASK} into the run's name, such as {name}-{TASK}")
    if not options.array and any(TASK in argument for argument in arguments):
        raise OptionError(f"{TASK} is the index of an array's task: give slurm.array, such as 0-7")
    tasks = max(options.gpus, 1)
    shape = [f"--trainer.num_nodes={options.nodes}", f"--trainer.devices={tasks}"]
    command = options.command or f"{shlex.quote(sys.executable)} -m lit_personalize"
    parts = {
        "DIRECTIVES": "\n".join(f"#SBATCH {line}" for line in _directives(options, name, logs, tasks)),
        "TITLE": f"Run {name}; written by `litp slurm render`.",
        "ENVIRONMENT": "\n".join(f"export {key}={shlex.quote(value)}" for key, value in options.environment.items()),
        "SETUP": "\n".join([*(f"module load {shlex.quote(m)}" for m in options.modules), *options.setup]),
        "SCRATCH": options.scratch or "${TMPDIR:-/tmp}",
        "SRUN": f" --container-image={shlex.quote(options.container)}" if options.container else "",
        "COMMAND": " ".join([command, "fit", *(_argument(a) for a in (*shape, *arguments))]),
        "RESTARTS": str(options.restarts if options.requeue else 0),
    }
    text = re.sub(r"@([A-Z]+)@", lambda found: parts[found[1]], TEMPLATE.read_text(encoding="utf-8"))
    return re.sub(r"\n{3,}", "\n\n", text)


def _directives(options: Options, name: str, logs: Path | str, tasks: int) -> list[str]:
    label = re.sub(r"[^A-Za-z0-9_.-]+", "-", name.replace(TASK, "")).strip("-") or "litp"
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
    return '"$SLURM_ARRAY_TASK_ID"'.join(shlex.quote(part) if part else "" for part in argument.split(TASK)) or "''"
