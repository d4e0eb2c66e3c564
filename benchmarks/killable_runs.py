"""`litp fit` in processes that can be killed: every start is forked from a server that has imported torch.

Only the imports are shared. What runs is the command line itself, on one rank, or on several with the variables that
torchrun gives; when one rank dies, the others are told to end, as torchrun and srun do.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from lit_personalize import checkpoints

ROOT = Path(__file__).resolve().parents[1]
PATHS = [str(ROOT / holder) for holder in ("benchmarks", "", "kernels", "datamodules", "callbacks", "slurm")]
PATIENCE = 60.0
"""Seconds in which the other ranks of a killed one have ended by themselves."""
STAGES = ("before", "staged", "filling", "flushing and hashing", "marked", "renamed, pruning", "after")
"""Of a save, by what is on the disk."""
LIMIT = 300.0
"""Seconds after which a start hangs."""


def _command(arguments: Sequence[str], folder: Path, variables: dict[str, str], log: Path) -> None:
    """`litp fit` in a process of its own, as a shell would start it there."""
    os.setsid()
    os.chdir(folder)
    multiprocessing.set_start_method("fork", force=True)  # Linux' own, for the loader's workers
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.update(variables)
    sys.argv = ["litp", "fit", *arguments]
    from lit_personalize.cli.main import main

    sys.exit(main(sys.argv[1:]))


class Server:
    """Where starts are forked from."""

    def __init__(self) -> None:
        before = os.environ.get("PYTHONPATH", "")
        os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, *([before] if before else [])])  # for the server, too
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["lit_personalize.fitting", "sample_ledger", "lit_callbacks.run_checkpoint",
                                             "lit_datamodules.personalization", "killable_runs"])  # fmt: skip

    def start(self, arguments: Sequence[str], folder: Path, ranks: int = 1) -> Started:
        """Begin the command in a folder; its output is added to `folder/log-RANK.txt`."""
        shared = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "LITP_ALLOW": "sample_ledger"}
        given = list(arguments)
        if ranks > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            given += ["--trainer.devices", str(ranks), "--trainer.strategy", "ddp"]
            shared |= {
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "crashes",
            }  # fmt: skip
        processes = []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            log = folder / f"log-{rank}.txt"
            process = self.context.Process(target=_command, args=(given, folder, {**shared, **own}, log))
            process.start()
            processes.append(process)
        return Started(processes, time.monotonic())


@dataclass
class Started:
    """The ranks of one start."""

    processes: list[BaseProcess]
    began: float

    @property
    def running(self) -> bool:
        return all(process.exitcode is None for process in self.processes)

    def signal(self, rank: int, number: signal.Signals) -> None:
        """To one rank alone."""
        pid = self.processes[rank].pid
        if pid is not None and self.processes[rank].exitcode is None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self) -> list[int]:
        """Exit codes of all ranks; once one has failed, the others have `PATIENCE` seconds.

        Raises:
            TimeoutError: A rank hung; all are ended.
        """
        until, told = self.began + LIMIT, False
        try:
            while any(process.exitcode is None for process in self.processes):
                failed = [p for p in self.processes if p.exitcode not in (None, 0)]
                if failed and not told:
                    told, until = True, time.monotonic() + PATIENCE
                    for rank in range(len(self.processes)):
                        self.signal(rank, signal.SIGTERM)
                if time.monotonic() > until:
                    raise TimeoutError(f"ranks hung: exit codes {[p.exitcode for p in self.processes]}")
                time.sleep(0.01)
        finally:
            self.end()
        return [int(p.exitcode or 0) for p in self.processes]

    def end(self) -> None:
        """By force, where still running, with what they started."""
        for process in self.processes:
            if process.pid is not None and process.exitcode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.join()


# ---- what is on the disk ----------------------------------------------------------------------------


def stage_of(folder: Path, step: int, keep_last: int, whole: int) -> str:
    """How far the save of `step` has come, by what is in `checkpoints/`; `whole` is the bytes of a state file."""
    place = checkpoints.staged(folder, step)
    with suppress(FileNotFoundError):
        names = {entry.name: entry.stat().st_size for entry in os.scandir(place)}
        if any(checkpoints.MARK in name for name in names):
            return "marked"
        if checkpoints.STATE not in names:
            return "staged"
        return "filling" if names[checkpoints.STATE] < whole else "flushing and hashing"
    published = checkpoints.published(folder)
    if step not in [number for number, _ in published]:
        return "before"
    return "renamed, pruning" if len(published) > keep_last else "after"


def untrue(folder: Path) -> list[str]:
    """Directories that claim to be complete and are not, with the reasons; those of killed saves as well."""
    found = [
        f"{path.name}: {reason}"
        for _, path in checkpoints.published(folder)
        if (path / checkpoints.MARK).exists()
        for reason in checkpoints.problems(path)
    ]
    for mark in folder.glob(f".tmp-step-*/{checkpoints.MARK}"):
        for name, written in json.loads(mark.read_text(encoding="utf-8"))["files"].items():
            with (mark.parent / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != written["sha256"]:
                    found.append(f"{mark.parent.name}: {name} has another sha256")
    return found
