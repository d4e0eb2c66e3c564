"""What a job asks of SLURM: the `slurm:` section of a configuration, over a profile of the cluster.

A profile is `~/.config/litp/slurm/NAME.yaml` (`XDG_CONFIG_HOME` is heeded) with the same keys; it has what is the same
for all runs of a cluster.
"""

from __future__ import annotations

import difflib
import os
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml


class OptionError(ValueError):
    """A wrong key or value; the message names it and the fix."""

    exit_code = 2


@dataclass(frozen=True)
class Options:
    """Empty strings and zeros leave the matter to the cluster's defaults."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    reservation: str = ""
    constraint: str = ""
    time: str = ""
    """Limit, such as 8:00:00 or 1-12:00:00."""
    nodes: int = 1
    gpus: int = 0
    """On each node, with a task each; 0 trains on CPUs, with one task a node."""
    cpus: int = 0
    """For each task."""
    memory: str = ""
    """For each node, such as 64G."""
    array: str = ""
    """Indices, such as 0-7%2; tasks find theirs in SLURM_ARRAY_TASK_ID, and the run's name ends with it."""
    signal: str = "USR2"
    """Sent before the time limit: USR2, USR1 or TERM."""
    lead: int = 120
    """Seconds before the limit at which it is sent."""
    requeue: bool = True
    """Queue the job again after a preemption, a lost node or a crash; wrong input is not tried again."""
    restarts: int = 50
    """How often at most."""
    modules: list[str] = field(default_factory=list)
    """For `module load`."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before the training."""
    container: str = ""
    """Image for `srun --container-image` (pyxis)."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the job; those of the shell that submits do not reach it."""
    scratch: str = ""
    """Folder on each node for caches of compilers; ${TMPDIR:-/tmp} by default."""
    command: str = ""
    """What `litp` is on the nodes; by default the program that submits, by its path."""
    extra: list[str] = field(default_factory=list)
    """Further options of sbatch, such as --mail-type=FAIL."""


def options_of(*sections: Mapping[str, Any] | None) -> Options:
    """Later sections win; `environment` is merged, lists are replaced.

    Raises:
        OptionError: An unknown key, a wrong type or value.
    """
    known = {entry.name: entry.type for entry in fields(Options)}
    given: dict[str, Any] = {}
    for section in sections:
        if section is not None and not isinstance(section, Mapping):
            raise OptionError(f"slurm: must be a mapping of options, not {section!r}")
        for key, value in (section or {}).items():
            if key not in known:
                close = difflib.get_close_matches(str(key), known, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"options: {', '.join(known)}"
                raise OptionError(f"slurm.{key} is no option; {hint}")
            value = _checked(key, value)
            given[key] = {**given.get(key, {}), **value} if isinstance(value, dict) else value
    options = Options(**given)
    _check_values(options)
    return options


def profile(name: str) -> dict[str, Any]:
    """The profile of a cluster, by name or by the path of its file.

    Raises:
        OptionError: There is none, or it is not YAML.
    """
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "litp" / "slurm"
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        there = ", ".join(sorted(p.stem for p in folder.glob("*.yaml"))) or "none"
        raise OptionError(f"there is no profile {path}; profiles in {folder}: {there}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"the profile {path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise OptionError(f"the profile {path} must hold options, such as partition: gpu")
    return found


def _checked(key: str, value: Any) -> Any:
    wanted = get_type_hints(Options)[key]
    if wanted is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        raise OptionError(f"slurm.{key} must be text, not {value}: quote it in YAML (8:00:00 is read as a number)")
    kind: Any = {str: str, int: int, bool: bool}.get(wanted) or (dict if "dict" in str(wanted) else list)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {str: "text", int: "a whole number", bool: "true or false", dict: "a mapping", list: "a list"}
        raise OptionError(f"slurm.{key} must be {names[kind]}, not {value!r}")
    if kind is dict:
        value = {str(name): str(of) for name, of in value.items()}
    if kind is list:
        value = [str(entry) for entry in value]
    lines = [value] if isinstance(value, str) else [*value.values()] if isinstance(value, dict) else value
    if kind in (str, dict, list) and key != "setup" and any("\n" in line for line in lines):
        raise OptionError(f"slurm.{key} must be on one line")
    return value


def _check_values(options: Options) -> None:
    for key, least in (("nodes", 1), ("gpus", 0), ("cpus", 0), ("lead", 0), ("restarts", 0)):
        if getattr(options, key) < least:
            raise OptionError(f"slurm.{key} must be at least {least}, not {getattr(options, key)}")
    if options.signal not in ("USR2", "USR1", "TERM") or not hasattr(signal, f"SIG{options.signal}"):
        raise OptionError(f"slurm.signal must be USR2, USR1 or TERM, not {options.signal!r}")
    for name in options.environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise OptionError(f"slurm.environment: {name!r} is no name of a variable")
    if options.time and not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}|UNLIMITED", options.time):
        raise OptionError(f"slurm.time must look like 8:00:00 or 1-12:00:00, not {options.time!r}")
    if options.array and not re.fullmatch(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?", options.array):
        raise OptionError(f"slurm.array must look like 0-7%2, not {options.array!r}")
