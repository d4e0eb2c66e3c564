"""Job scripts that were submitted, and what Slurm says of them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from lit_slurm.render import of_task

FOLDER = "slurm"
RECORD = "jobs.jsonl"


class SlurmError(RuntimeError):
    """Slurm is not here, or refused; the message has its own words."""

    exit_code = 1


@dataclass(frozen=True)
class Job:
    """One submission."""

    job: str
    run: str
    """The run's name; "{task}" stands for an array's index."""
    script: str
    submitted: str


@dataclass(frozen=True)
class State:
    """What Slurm knows of a job, or of one task of an array, now."""

    job: str
    state: str
    elapsed: str
    restarts: int
    reason: str
    """Why it waits, or the nodes where it runs."""


def folder_of(root: Path, run: str) -> Path:
    """Where a run's job scripts and logs are: beside the runs, since an array has many of them."""
    return root / FOLDER / of_task(run, "task")


def write(text: str, folder: Path) -> Path:
    """Write a script under the next number."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = folder / f"job-{number}.sbatch"
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
            return path
        except FileExistsError:
            number += 1


def submit(script: Path, run: str) -> Job:
    """Hand a script to sbatch and note the job beside it.

    Raises:
        SlurmError: There is no sbatch, it refused, or the job could not be noted.
    """
    # Directives are the script's alone; the shell's SBATCH_ variables would go before them.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SBATCH_")}
    number = _run(["sbatch", "--parsable", str(script)], clean).partition(";")[0]
    job = Job(number, run, str(script), datetime.now(UTC).isoformat(timespec="seconds"))
    try:
        with (script.parent / RECORD).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(job)) + "\n")
    except OSError as error:  # the job runs all the same: submitting it again would start a second one
        record = script.parent / RECORD
        raise SlurmError(f"job {number} is queued, but not noted in {record}: {error.strerror}") from error
    return job


def submitted(root: Path) -> list[Job]:
    """All jobs of the runs below a folder, oldest first.

    Raises:
        SlurmError: A record cannot be read.
    """
    found = []
    for path in sorted((root / FOLDER).glob(f"*/{RECORD}")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                found.append(Job(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise SlurmError(f"line {number} of {path} is no job: remove the line") from error
    return sorted(found, key=lambda job: job.submitted)


def states(jobs: Iterable[str]) -> dict[str, list[State]]:
    """By job, what is queued or running of it; nothing of a job that has ended.

    Raises:
        SlurmError: There is no squeue, or no controller answers.
    """
    wanted = set(jobs)
    found: dict[str, list[State]] = {}
    fields = "JobID:|,ArrayJobID:|,ArrayTaskID:|,State:|,TimeUsed:|,RestartCnt:|,ReasonList:"
    for line in _run(["squeue", "--noheader", "--array", "-O", fields]).splitlines():
        number, array, task, state, elapsed, restarts, reason = (part.strip() for part in line.split("|", 6))
        if array in wanted or number in wanted:
            label = number if task == "N/A" else f"{array}_{task}"
            at = State(label, state, elapsed, int(restarts or 0), reason)
            found.setdefault(array if array in wanted else number, []).append(at)
    return found


def _run(command: list[str], environment: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    except FileNotFoundError as error:
        raise SlurmError(f"there is no {command[0]} here: run this on a login node, or `litp slurm render`") from error
    if done.returncode:
        raise SlurmError(f"{command[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout.strip()
