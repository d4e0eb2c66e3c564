"""What runs have not in common: configuration keys, figures, exported weights, environments. Needs no torch."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_personalize.errors import DataError, UsageError
from lit_personalize.run_directory import RunDirectory
from lit_personalize.run_state import Curve, RunState, config_of, curves_of, state_of
from lit_personalize.tensor_files import read_header

OWN = ("name", "root", "resume")
"""Keys in which any two runs differ."""
NO_PART = ("time", "job", "recipe")
"""Of env.json, what is of a start and not of its surroundings."""
LOWER = ("loss", "error", "distance", "kid", "mmd", "drift", "fid")
"""Words in the names of figures of which less is better."""


@dataclass(frozen=True)
class Figure:
    """One figure of one run: as it was logged last, and at its best."""

    last: float
    best: float
    at: int | None
    """Optimizer steps done at the best; None of an evaluation."""


@dataclass(frozen=True)
class Comparison:
    """Some runs side by side. Mappings to lists have one entry for each run, in the order of `runs`."""

    runs: list[RunState]
    configuration: dict[str, list[Any]]
    """Dotted keys of which the values differ; None where a run lacks it."""
    figures: dict[str, list[Figure | None]]
    exports: dict[str, list[str | None]]
    """File -> the first 16 digits of a hash of its tensors; metadata, such as the run's name, does not count."""
    environment: dict[str, list[Any]]
    """Dotted keys of env.json of which the values differ."""
    curves: dict[str, list[Curve]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "runs": [state.as_dict() for state in self.runs],
            "configuration": self.configuration,
            "figures": {name: [f and vars(f) for f in row] for name, row in self.figures.items()},
            "exports": {n: {"equal": len(set(row)) == 1, "hashes": row} for n, row in self.exports.items()},
            "environment": self.environment,
        }


def compare(runs: Sequence[RunDirectory], by: str = "") -> Comparison:
    """Put runs side by side.

    Args:
        by: A figure by whose best value they are sorted, or a configuration key; "" leaves them in order.

    Raises:
        DataError: A configuration or a record cannot be read.
        UsageError: No run has the figure or key `by`.
    """
    curves = [curves_of(run.metrics) for run in runs]
    evaluated = [_evaluation(run.path / "evaluation.json") for run in runs]
    configs = [flattened(config_of(run)) for run in runs]
    names = list(dict.fromkeys(name for one in curves for name in one))
    figures = {name: [_figure(name, one.get(name)) for one in curves] for name in names}
    for name in dict.fromkeys(name for one in evaluated for name in one):
        figures[name] = [Figure(v, v, None) if (v := one.get(name)) is not None else None for one in evaluated]
    hashes = [_hashes(run) for run in runs]
    made = Comparison(
        [state_of(run) for run in runs],
        {key: row for key, row in differing(configs).items() if key not in OWN},
        figures,
        {name: [one.get(name) for one in hashes] for name in dict.fromkeys(name for one in hashes for name in one)},
        differing([flattened(_environment(run.environment)) for run in runs]),
        {name: [one.get(name, []) for one in curves] for name in names},
    )
    return _in_order(made, by) if by else made


def lower_is_better(name: str) -> bool:
    return any(word in name.lower() for word in LOWER)


def flattened(value: Any, key: str = "") -> dict[str, Any]:
    """Leaves of mappings, and of lists of mappings, by dotted keys such as `adapters.0.init_args.rank`."""
    if isinstance(value, Mapping) and value:
        inner: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        inner = enumerate(value)
    else:
        return {key: value} if key else {}
    found: dict[str, Any] = {}
    for name, item in inner:
        found |= flattened(item, f"{key}.{name}" if key else str(name))
    return found


def differing(mappings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Keys of which the values differ, with the value of each mapping, None where it has none."""
    keys = dict.fromkeys(key for one in mappings for key in one)
    rows = {key: [one.get(key) for one in mappings] for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def tensors_hash(path: Path) -> str:
    """16 hex digits of the names, types, shapes and bytes of a safetensors file's tensors, without its metadata.

    Raises:
        DataError: It is damaged.
    """
    start, tensors = read_header(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for name, about in sorted(tensors.items()):
            begin, end = about["data_offsets"]
            digest.update(f"{name} {about['dtype']} {about['shape']} ".encode())
            file.seek(start + begin)
            while begin < end and (chunk := file.read(min(end - begin, 1 << 20))):
                digest.update(chunk)
                begin += len(chunk)
    return digest.hexdigest()[:16]


def _figure(name: str, curve: Curve | None) -> Figure | None:
    if not curve:
        return None
    known = [(value, step) for step, value in curve if math.isfinite(value)]
    if not known:
        return Figure(curve[-1][1], curve[-1][1], curve[-1][0])
    value, step = min(known) if lower_is_better(name) else max(known, key=lambda pair: (pair[0], -pair[1]))
    return Figure(curve[-1][1], value, step)


def _evaluation(path: Path) -> dict[str, float]:
    """Figures that `litp evaluate -o RUN/evaluation.json` left."""
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))["figures"]
        return {str(name): float(figure["value"]) for name, figure in figures.items() if figure["value"] is not None}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no report of litp evaluate ({error!r}); write it again, or remove it") from error


def _environment(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}; start the run again, which writes it anew") from error
    return {key: value for key, value in found.items() if key not in NO_PART} if isinstance(found, dict) else {}


def _hashes(run: RunDirectory) -> dict[str, str]:
    """Of every adapter file, by its name without the run's."""
    found = {}
    for path in sorted(run.exports.rglob("*.safetensors")):
        if path.relative_to(run.exports).parts[0] != "pipeline":  # a whole model, of gigabytes
            found[path.relative_to(run.exports).as_posix().replace(run.name, "NAME")] = tensors_hash(path)
    return found


def _in_order(made: Comparison, by: str) -> Comparison:
    """Sorted, those without the figure last."""
    if by in made.figures:
        sign = 1 if lower_is_better(by) else -1
        keys: list[Any] = [math.inf if f is None or math.isnan(f.best) else sign * f.best for f in made.figures[by]]
    elif by in made.configuration:
        keys = [(value is None, isinstance(value, str), value) for value in made.configuration[by]]
        if any(isinstance(value, (list, dict)) for _, _, value in keys):
            raise UsageError(f"--by {by}: its values are lists, which have no order")
    else:
        known = ", ".join(made.figures) or "none, for no run has logged anything"
        near = difflib.get_close_matches(by, [*made.figures, *made.configuration], 3, 0.5)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(f"--by {by}: these runs have no such figure or key; figures: {known}{meant}")
    order = sorted(range(len(made.runs)), key=keys.__getitem__)

    def rows(table: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        return {name: [row[i] for i in order] for name, row in table.items()}

    return Comparison(
        [made.runs[i] for i in order], rows(made.configuration), rows(made.figures), rows(made.exports),
        rows(made.environment), rows(made.curves),
    )  # fmt: skip
