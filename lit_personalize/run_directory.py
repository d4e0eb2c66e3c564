"""The one directory of a run: its paths, its owner, and the record of how it was made."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from lit_personalize import atomic, checkpoints
from lit_personalize.errors import RunLockedError, UsageError

log = logging.getLogger(__name__)
PACKAGES = ("lit-personalize", "lightning", "torch", "diffusers", "transformers", "peft", "safetensors", "numpy")

JOB = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT")


class RunDirectory:
    """`<root>/<name>/`. Making the object writes nothing; `create` and `lock` do.

    Args:
        root: Holds all runs.
        name: Of this one; a single path component.

    Raises:
        UsageError: The name is none for a directory.
    """

    def __init__(self, root: Path | str, name: str):
        if not name or name in (".", "..") or name.startswith("-") or any(c in name for c in "/\\\0\n"):
            raise UsageError(f"run name {name!r} must be one directory name, such as cat-v1")
        self.root = Path(root)
        self.name = name
        self.path = self.root / name
        self._descriptor: int | None = None

    # ---- paths ------------------------------------------------------------------------------------

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def command(self) -> Path:
        """One line per start of the run."""
        return self.path / "command.txt"

    @property
    def environment(self) -> Path:
        return self.path / "env.json"

    @property
    def recipe(self) -> str:
        """The recipe that the run was started from, such as "custom_diffusion"; "" where that is not known."""
        try:
            return str(json.loads(self.environment.read_text(encoding="utf-8")).get("recipe", ""))
        except (FileNotFoundError, ValueError, AttributeError):
            return ""  # a name for cards, without which they say what trained

    @property
    def manifest(self) -> Path:
        """The fate of every input file."""
        return self.path / "manifest.jsonl"

    @property
    def sheet(self) -> Path:
        """What the model sees, as a picture."""
        return self.path / "sheet.png"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def exports(self) -> Path:
        return self.path / "exports"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def finished(self) -> Path:
        """What was trained to its end and exported; see `mark_finished`."""
        return self.exports / "finished.json"

    @property
    def readme(self) -> Path:
        """The model card."""
        return self.path / "README.md"

    @property
    def lock_file(self) -> Path:
        return self.path / ".lock"

    # ---- making -----------------------------------------------------------------------------------

    def exists(self) -> bool:
        return self.path.is_dir()

    def create(self) -> RunDirectory:
        """Make the directory and its folders; what is there stays."""
        for folder in (self.path, self.checkpoints, self.samples, self.exports):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"cannot make the run directory {folder}: {error.strerror}") from error
        return self

    def write_text(self, name: str, text: str) -> Path:
        """Write a file of the run, all or nothing."""
        atomic.write_text(self.path / name, text)
        return self.path / name

    def write_record(self, config: str, recipe: str = "") -> None:
        """Write how the run is made: its resolved configuration, this start's command line, the environment.

        Args:
            recipe: What the configuration came from; without one, what an earlier start said stays.
        """
        self.write_text(self.config.name, config)
        self.write_command()
        self.write_env(recipe or self.recipe)

    def write_command(self, arguments: list[str] | None = None) -> Path:
        """Add this start's command line, with its time, to command.txt."""
        before = self.command.read_text(encoding="utf-8") if self.command.exists() else ""
        line = f"{shlex.join(sys.argv if arguments is None else arguments)}  # {_now()}\n"
        return self.write_text(self.command.name, before + line)

    def write_env(self, recipe: str = "") -> Path:
        """Write versions, machine, threads and the git commit of the working directory, and a recipe if given."""
        described = ({"recipe": recipe} if recipe else {}) | describe_environment()
        return self.write_text(self.environment.name, json.dumps(described, indent=1) + "\n")

    def note_preemption(self, what: str) -> Path:
        """Add a line with its time, and the job where there is one, to preempt.log."""
        path = self.path / "preempt.log"
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        words = [_now(), what, *(f"{name}={value}" for name, value in _job().items())]
        return self.write_text(path.name, f"{before}{' '.join(words)}\n")

    # ---- finishing --------------------------------------------------------------------------------

    def mark_finished(self, config: str) -> None:
        """Note that training by the text of this configuration is at its end, and that its files are exported."""
        note = {"config_sha256": _sha256(config), "step": self.newest_step(), "files": self._result_sizes()}
        self.write_text("exports/finished.json", json.dumps(note, indent=1) + "\n")

    def finished_at(self, config: str) -> int | None:
        """Step at which training by this configuration ended; None if it did not, or its files are not those written.

        A configuration that differs in anything is another one, and so are the run's files after `litp export`.
        """
        try:
            note = json.loads(self.finished.read_text(encoding="utf-8"))
            same = note["config_sha256"] == _sha256(config) == _sha256(self.config.read_text(encoding="utf-8"))
            if same and note["files"] == self._result_sizes() and note["step"] == self.newest_step():
                return int(note["step"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None  # no note, or none that can be read: finishing again does no harm
        return None

    def newest_step(self) -> int:
        """Step of the newest checkpoint, unchecked; 0 without one."""
        return max((step for step, _ in checkpoints.published(self.checkpoints)), default=0)

    def _result_sizes(self) -> dict[str, int]:
        results = [self.readme, *(path for path in self.exports.rglob("*") if path != self.finished)]
        return {p.relative_to(self.path).as_posix(): p.stat().st_size for p in sorted(results) if p.is_file()}

    # ---- owning -----------------------------------------------------------------------------------

    def lock(self) -> RunDirectory:
        """Own the run until `unlock` or the end of this process, however it ends.

        Raises:
            RunLockedError: Another process owns it.
        """
        if self._descriptor is not None:
            return self
        self.create()
        descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _take(descriptor)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 4096, 0).decode(errors="replace")
            os.close(descriptor)
            raise RunLockedError(
                f"run {self.path} is owned by {_owner(owner)}: wait for it, end it, or choose another run name"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                os.close(descriptor)
                raise
            log.warning("%s is on a file system without locks: two processes could write this run", self.path)
        owner_line = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "start": _now()}) + "\n"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, owner_line.encode(), 0)
        self._descriptor = descriptor
        # A forked loader worker would hold the lock on after its parent was killed.
        os.register_at_fork(after_in_child=self._forget)
        return self

    def owner_line(self) -> str:
        """What the owner wrote of itself; it stays if the owner was killed, else "" when nobody owns the run."""
        try:
            return self.lock_file.read_text(encoding="utf-8", errors="replace").strip("\0 \n")
        except OSError:
            return ""

    def is_held(self) -> bool:
        """Whether a process owns the run now; where a file system has no locks, whether one said so."""
        if not self.owner_line():
            return False
        try:
            descriptor = os.open(self.lock_file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back at once
        except OSError:
            return True
        finally:
            os.close(descriptor)
        return False

    def unlock(self) -> None:
        """Give the run free."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._forget()

    def _forget(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> RunDirectory:
        return self.lock()

    def __exit__(self, *_: object) -> None:
        self.unlock()


def _take(descriptor: int) -> None:
    """Lock an open file for this process alone; `is_held` may have it for an instant.

    Raises:
        BlockingIOError: Another process has it.
    """
    for wait in (0.02, 0.1, None):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if wait is None:
                raise
            time.sleep(wait)


def describe_environment() -> dict[str, Any]:
    """Versions, machine, threads and git commit; imports nothing that is not loaded."""
    described: dict[str, Any] = {
        "time": _now(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {name: _version(name) for name in PACKAGES},
        "git": _git_commit(Path.cwd()),
    }
    if job := _job():
        described["job"] = job
    if (torch := sys.modules.get("torch")) is not None:
        described["torch_threads"] = torch.get_num_threads()
        described["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        described["cuda"] = torch.version.cuda
    return described


def _job() -> dict[str, str]:
    """Slurm's numbers of the job that this process belongs to."""
    return {name.removeprefix("SLURM_").lower(): os.environ[name] for name in JOB if name in os.environ}


def _git_commit(folder: Path) -> dict[str, Any] | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):  # no git, or no repository
        return None


def _owner(text: str) -> str:
    try:
        owner = json.loads(text)
        return f"process {owner['pid']} on {owner['host']}, started {owner['start']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
