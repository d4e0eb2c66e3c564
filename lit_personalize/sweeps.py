"""A sweep: one configuration, and a table of runs that each change some of its keys. Needs no torch.

`<root>/sweeps/<name>/` holds `base.yaml` (the resolved configuration), `tasks/003.yaml` (what that task changes, its
run's name among it) and `table.json` (task -> run and values), which is written last: with it the sweep exists.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_personalize import atomic
from lit_personalize.errors import DataError, UsageError
from lit_personalize.list_replacement import NUMBER, place
from lit_personalize.run_comparison import OWN, differing, flattened
from lit_personalize.run_directory import RunDirectory

FOLDER = "sweeps"
ALIASES = {"seed": ("model.init_args.seed", "data.init_args.seed")}
"""Short keys, and the keys that they stand for."""
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
FORMAT = 1

Point = dict[str, Any]
"""The values of one task by key, as they were given."""


@dataclass(frozen=True)
class Sweep:
    """All of one sweep.

    Args:
        root: Folder of runs.
        name: Its runs are `<name>-000` and so on.
        points: Of its tasks, in order.
    """

    root: Path
    name: str
    points: list[Point]

    @property
    def path(self) -> Path:
        return self.root / FOLDER / self.name

    @property
    def base(self) -> Path:
        return self.path / "base.yaml"

    @property
    def digits(self) -> int:
        return max(3, len(str(len(self.points) - 1)))

    @property
    def pattern(self) -> str:
        """The name of a task's run, as job scripts have it."""
        return f"{self.name}-{{task:0{self.digits}}}"

    def run_name(self, task: int) -> str:
        return f"{self.name}-{task:0{self.digits}}"

    def run(self, task: int) -> RunDirectory:
        return RunDirectory(self.root, self.run_name(task))

    def arguments(self, task: int | None = None, folder: Path | None = None) -> list[str]:
        """Of `litp fit` for a task, or for the one that a job script fills in."""
        name = f"{{task:0{self.digits}}}" if task is None else f"{task:0{self.digits}}"
        place_ = folder or self.path
        return ["-c", str(place_ / "base.yaml"), "-c", str(place_ / "tasks" / f"{name}.yaml")]

    def write(self, base: str, overrides: Sequence[Mapping[str, Any]], folder: Path | None = None) -> None:
        """Write all files, each whole or not at all, the table last.

        Args:
            base: Text of the resolved configuration.
            overrides: Of each task.
            folder: Elsewhere than in `path`.
        """
        folder = folder or self.path
        atomic.write_text(folder / "base.yaml", base)
        for task, override in enumerate(overrides):
            text = yaml.safe_dump(dict(override), sort_keys=False, allow_unicode=True)
            atomic.write_text(folder / "tasks" / f"{task:0{self.digits}}.yaml", text)
        rows = [{"task": task, "run": self.run_name(task), "values": point} for task, point in enumerate(self.points)]
        table = {"format": FORMAT, "name": self.name, "tasks": rows}
        atomic.write_text(folder / "table.json", json.dumps(table, indent=1, ensure_ascii=False, default=str) + "\n")

    def refuse_another(self, base: Mapping[str, Any]) -> None:
        """Make sure that what stands there under this name is this sweep.

        Raises:
            UsageError: It has other values, or began with another configuration.
        """
        there = read(self.root, self.name)
        if there.points != json.loads(json.dumps(self.points, default=str)):
            raise UsageError(
                f"sweep {self.path} has {len(there.points)} tasks with other values: give it the same --over as "
                "before, or choose another --name"
            )
        before = yaml.safe_load(self.base.read_text(encoding="utf-8"))
        changed = [key for key in differing([flattened(before), flattened(base)]) if key not in OWN]
        if changed:
            raise UsageError(
                f"sweep {self.path} began with another configuration ({', '.join(changed)} differ), with which its "
                "other runs were made: change that back, or choose another --name"
            )


def read(root: Path, name: str) -> Sweep:
    """A sweep that was written.

    Raises:
        DataError: There is none of this name, or its table cannot be read.
    """
    path = root / FOLDER / name / "table.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise DataError(f"{path} has format {found['format']}, this release reads {FORMAT}")
        return Sweep(root, name, [dict(task["values"]) for task in found["tasks"]])
    except FileNotFoundError as error:
        there = ", ".join(sorted(p.parent.name for p in (root / FOLDER).glob("*/table.json"))) or "none"
        raise DataError(f"there is no sweep {name!r} in {root / FOLDER}; sweeps: {there}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no table of a sweep ({error!r}); remove the folder and start it again") from error


# ---- values ---------------------------------------------------------------------------------------------------------


def values_of(text: str) -> tuple[str, list[Any]]:
    """Read `key=4,8,16` or `key=0..9`: values as YAML has them, both ends of a range within.

    Raises:
        UsageError: It is something else.
    """
    key, equals, listed = text.partition("=")
    if not equals or not re.fullmatch(r"\w[\w.]*", key):
        raise UsageError(f"--over {text!r} must be KEY=VALUE,VALUE,..., such as trainer.max_steps=100,200")
    try:
        found = yaml.safe_load(f"[{listed}]")
    except yaml.YAMLError as error:
        raise UsageError(f"--over {text!r}: these values are no YAML; quote those with brackets or colons") from error
    return key, _spread(key, found)


def _spread(key: str, values: Any) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise UsageError(f"--over {key}: there is no value; give KEY=VALUE,VALUE,...")
    spread: list[Any] = []
    for value in values:
        if isinstance(value, str) and (match := RANGE.fullmatch(value)):
            first, last = int(match[1]), int(match[2])
            if last < first:
                raise UsageError(f"--over {key}: the range {value} is empty; write {last}..{first}")
            spread += range(first, last + 1)
        else:
            spread.append(float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value)
    return spread


def points_of(axes: Sequence[tuple[str, list[Any]]], zipped: bool) -> list[Point]:
    """Every combination, the last key's values fastest; with `zipped` the first values of all keys, the second...

    Raises:
        UsageError: A key stands twice, or is none of a sweep's; zipped lists differ in length.
    """
    keys = [key for key, _ in axes]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise UsageError(f"--over {', '.join(sorted(twice))} is given twice; put all values into one")
    if own := [key for key in keys if key.split(".")[0] in (*OWN, "slurm")]:
        raise UsageError(f"--over {own[0]}: the sweep sets it for each run; it is no key to go over")
    meant = [key for given in keys for key in ALIASES.get(given, (given,))]
    for key in meant:
        if within := [other for other in meant if other.startswith(f"{key}.") or meant.count(other) > 1]:
            raise UsageError(f"--over {key} and {within[0]} set the same thing; give one of them")
    if not axes:
        raise UsageError("a sweep goes over keys: give --over KEY=VALUE,VALUE,... or --over-file FILE")
    lists = [values for _, values in axes]
    if zipped and len({len(values) for values in lists}) > 1:
        counts = ", ".join(f"{key} has {len(values)}" for key, values in axes)
        raise UsageError(f"--zip takes lists of one length: {counts}")
    rows = zip(*lists, strict=True) if zipped else itertools.product(*lists)
    return [dict(zip(keys, row, strict=True)) for row in rows]


def points_in(path: Path, zipped: bool, axes: Sequence[tuple[str, list[Any]]] = ()) -> list[Point]:
    """Of a YAML file: a mapping of keys to lists, combined with `axes`; or a list of mappings, one for each task.

    Raises:
        UsageError: It is something else, or cannot be read.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--over-file {path} cannot be read: {error}") from error
    if isinstance(found, dict):
        listed = [(str(k), _spread(str(k), v if isinstance(v, list) else [v])) for k, v in found.items()]
        return points_of([*listed, *axes], zipped)
    if isinstance(found, list) and found and all(isinstance(point, dict) and point for point in found):
        points = [{str(key): value for key, value in point.items()} for point in found]
        for point in points:
            points_of([(key, [value]) for key, value in point.items()], False)  # refuses what is no key
        return [one | dict(more) for one in points for more in (points_of(axes, zipped) if axes else [{}])]
    raise UsageError(f"--over-file {path} must map keys to lists of values, or list one mapping for each task")


def override_of(base: Mapping[str, Any], point: Point, name: str) -> dict[str, Any]:
    """What a task's file says: its name and its values, nested; of a list's entry the whole list.

    Args:
        base: The resolved configuration.

    Raises:
        UsageError: A key goes through an entry that is not there.
    """
    whole = json.loads(json.dumps(base))
    override: dict[str, Any] = {"name": name}
    for given, value in point.items():
        for key in ALIASES.get(given, (given,)):
            target, put = place(whole, key, value)
            inner = override
            *parts, last = target.split(".")
            for part in parts:
                inner = inner.setdefault(part, {})
            inner[last] = put
    return override


def indices(tasks: Sequence[int]) -> str:
    """`0,2-5` of sorted numbers, as sbatch takes them."""
    parts = []
    for _, group in itertools.groupby(enumerate(tasks), key=lambda pair: pair[1] - pair[0]):
        run = [task for _, task in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ",".join(parts)
