"""What a run directory says of its run: how far it came, and what became of it. Needs no torch and asks no server."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lit_personalize import checkpoints
from lit_personalize.errors import DataError, UsageError
from lit_personalize.run_directory import RunDirectory
from lit_personalize.yaml_files import read_yaml

EXPORTS = ("*.safetensors", "peft/*/adapter_model.safetensors", "pipeline/model_index.json")
STATES = {
    "finished": "trained to its end and exported",
    "running": "a process owns it now",
    "preempted": "stopped by a cluster's notice, saved; the same command continues",
    "stopped": "ended after a checkpoint, by itself or by Ctrl-C; the same command continues",
    "killed": "its process is gone and gave no notice; the same command continues",
    "failed": "ended before its first checkpoint",
}
"""In C ten times as fast, where there is one."""
Curve = list[tuple[int, float]]
"""Optimizer steps done, and a figure."""


@dataclass(frozen=True)
class RunState:
    """One run at one moment.

    Args:
        state: One of `STATES`.
        step: Of the newest checkpoint; 0 without one.
        steps: At which training ends; None where epochs are counted, or where it never began.
        loss: That was logged last.
        checkpoint: Path of the newest one, unchecked.
        job: Of Slurm that started it last, such as 71 or 71_3.
        bytes: On the disk.
        updated: When it last logged or saved.
        exports: Names of its adapter files.
    """

    name: str
    path: str
    state: str
    step: int
    steps: int | None
    loss: float | None
    checkpoint: str | None
    job: str | None
    bytes: int
    updated: str | None
    exports: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def state_of(run: RunDirectory) -> RunState:
    """Read one run.

    Raises:
        DataError: Its configuration is no YAML.
    """
    config = config_of(run)
    saved = checkpoints.published(run.checkpoints)
    step, newest = saved[-1] if saved else (0, None)
    wanted = (config.get("trainer") or {}).get("max_steps")
    losses = curves_of(run.metrics).get("loss", [])
    exports = [path for pattern in EXPORTS for path in sorted(run.exports.glob(pattern))]
    marks = [path for path in (run.metrics, newest, run.finished, run.lock_file) if path and path.exists()]
    updated = max((path.stat().st_mtime for path in marks), default=None)
    return RunState(
        run.name, str(run.path), _state(run, step), step, wanted if wanted and wanted > 0 else None,
        losses[-1][1] if losses else None, str(newest) if newest else None, _job(run), size_of(run.path),
        datetime.fromtimestamp(updated, UTC).isoformat(timespec="seconds") if updated else None,
        [path.relative_to(run.exports).as_posix() for path in exports],
    )  # fmt: skip


def _state(run: RunDirectory, step: int) -> str:
    if run.is_held():
        return "running"
    if _is_finished(run, step):
        return "finished"
    if run.owner_line():  # whoever ends in order takes the line away
        return "killed"
    if not step:
        return "failed"
    notices = _text(run.path / "preempt.log").splitlines()
    return "preempted" if notices and re.search(rf"\bstep={step}\b", notices[-1]) else "stopped"


def _is_finished(run: RunDirectory, step: int) -> bool:
    """Whether it was trained to the end of the configuration that stands there; exporting again changes nothing."""
    try:
        note = json.loads(run.finished.read_text(encoding="utf-8"))
        same = note["config_sha256"] == hashlib.sha256(run.config.read_bytes()).hexdigest()
        return bool(same and note["step"] == step)
    except (OSError, ValueError, KeyError, TypeError):
        return False  # no note, or one that a crash cut short


def _job(run: RunDirectory) -> str | None:
    """As Slurm writes it."""
    try:
        job = json.loads(run.environment.read_text(encoding="utf-8")).get("job") or {}
    except (OSError, ValueError, AttributeError):
        return None
    if "array_task_id" in job:
        return f"{job.get('array_job_id', '?')}_{job['array_task_id']}"
    return job.get("job_id")


def config_of(run: RunDirectory) -> dict[str, Any]:
    """The resolved configuration; empty where training never began.

    Raises:
        DataError: It is no YAML.
    """
    try:
        found = read_yaml(run.config)
    except FileNotFoundError:
        return {}
    except UsageError as error:
        raise DataError(f"{error}; start the run again, which writes it anew") from error
    if not isinstance(found, dict):
        raise DataError(f"{run.config} is no configuration; start the run again, which writes it anew")
    return found


def curves_of(path: Path) -> dict[str, Curve]:
    """Every figure of a `metrics.csv` by optimizer steps done; a line that a kill cut short is left out."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(line for line in file if line.endswith("\n")))
    except (FileNotFoundError, UnicodeDecodeError):
        return {}
    found: dict[str, Curve] = {}
    for row in rows:
        if not (row.get("step") or "").isdigit():
            continue
        for name, text in row.items():
            if name not in ("step", "epoch", None) and text:
                try:
                    found.setdefault(name, []).append((int(row["step"]) + 1, float(text)))
                except (ValueError, TypeError):
                    continue  # a column of words is no curve
    return found


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; of those that vanish meanwhile, none."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if not path.is_dir() else 0
        except OSError:
            continue
    return total


# ---- finding --------------------------------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, also of one that failed before it trained."""
    return (folder / "config.yaml").is_file() or ((folder / ".lock").exists() and (folder / "checkpoints").is_dir())


def find_runs(places: Sequence[str | Path], root: Path | str) -> list[RunDirectory]:
    """The runs that are meant, each once: in the order of the places, within one by name with 4 before 16.

    Args:
        places: Names or patterns ("sweep-*") of runs in `root`, run directories, or folders of them; none is all.
        root: Folder of runs.

    Raises:
        DataError: A place holds no run.
    """
    found: dict[Path, RunDirectory] = {}
    for place in places or [Path(root)]:
        folders = _folders(str(place), Path(root))
        if not folders:
            raise DataError(_nothing(place, Path(root)))
        for folder in folders:
            found.setdefault(folder.resolve(), RunDirectory(folder.parent, folder.name))
    return list(found.values())


def _folders(place: str, root: Path) -> list[Path]:
    given = Path(place)
    if is_run(given):
        return [given.resolve() if given.name in ("", ".", "..") else given]
    inside = [path for path in _listed(root) if fnmatchcase(path.name, place) or path.name == place]
    return _in_order(inside) or _in_order(_listed(given))


def _listed(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and is_run(path)] if folder.is_dir() else []


def _in_order(folders: Iterable[Path]) -> list[Path]:
    return sorted(folders, key=lambda path: natural(path.name))


def natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts 4 before 16."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text) if part]


def _nothing(place: str | Path, root: Path) -> str:
    if Path(place).is_dir():
        return f"{place} holds no run (a folder with a config.yaml); name the folder that holds the runs"
    return f"there is no run {str(place)!r} in {root}, and no such folder; litp runs ls ROOT lists them"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
