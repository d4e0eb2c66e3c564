"""Which classes a configuration may name: importing a module runs its code, so a stranger's YAML may not choose it.

Ours, Lightning's parts of a trainer, and the optimizers that recipes and pages name. A user adds packages of their own
on the command line (`--allow my_package`) or in the environment (`LITP_ALLOW=my_package,other`), and never in a file.
jsonargparse asks this list before it imports anything, and again for where the found object was defined: so
`torch.optim.sgd.torch.load` is as little allowed as `torch.load`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jsonargparse import set_parsing_settings

from lit_personalize.errors import UsageError

OPTION, VARIABLE = "--allow", "LITP_ALLOW"
ALLOWED = (
    "lit_personalize", "lit_callbacks", "lit_datamodules", "lit_kernels",
    *(f"lightning.pytorch.{part}" for part in (
        "accelerators", "callbacks", "core", "loggers", "plugins", "profilers", "strategies", "trainer", "tuner",
    )),
    *(f"lightning.fabric.{part}" for part in ("plugins", "strategies", "accelerators")),
    "torch.optim", "bitsandbytes.optim", "deepspeed.ops", "prodigyopt",
)  # fmt: skip
"""Packages, modules and classes, each with all that is defined below it."""
PIPE = "pipe"
"""What allows shards of the form `pipe:COMMAND` in a configuration."""

_added: set[str] = set()


def take_allowed(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into all but its `--allow` options, and what those and the environment allow.

    Raises:
        UsageError: An entry is no dotted name.
    """
    rest, found = [], []
    waiting = list(arguments)
    while waiting:
        flag, equals, value = waiting.pop(0).partition("=")
        if flag != OPTION:
            rest.append(f"{flag}{equals}{value}")
            continue
        if not equals and (not waiting or waiting[0].startswith("-")):
            raise UsageError(f"{OPTION} needs the name of a package, such as {OPTION} my_package")
        found += (value if equals else waiting.pop(0)).split(",")
    found += os.environ.get(VARIABLE, "").split(",")
    names = [name.strip() for name in found if name.strip()]
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")) or name.split(".")[0] == "jsonargparse":
            raise UsageError(f"{name!r} cannot be allowed: {OPTION} and {VARIABLE} take names such as my_package")
    return rest, names


def allow_only(names: Iterable[str]) -> None:
    """From now on, parsers of this process import what `ALLOWED` and `names` cover; what earlier calls added ends."""
    allowed = {*ALLOWED, *names} - {PIPE}
    # The most specific entry decides, so one that has ended may not stand below one that is allowed.
    ended = {name for name in _added if not any(f"{name}.".startswith(f"{entry}.") for entry in allowed)}
    set_parsing_settings(
        import_path_denylist=["*", *sorted(ended)], import_path_allowlist=sorted(allowed | (_added - ended))
    )
    _added.update(allowed)


def refusal(path: str, key: str = "") -> str:
    """One sentence for a class that is not allowed."""
    module = path.rpartition(".")[0]
    return (
        f"{f'{key}: ' if key else ''}{path} is not among the classes that a configuration may name, since importing "
        f"one runs its code; if you trust it, add {OPTION} {module} or set {VARIABLE}={module}"
    )


def refuse_commands(data: Any, names: Iterable[str]) -> None:
    """Refuse shards that are commands, unless `pipe` is among the allowed names.

    Args:
        data: The `data` section of a configuration.

    Raises:
        UsageError: There is one.
    """
    if PIPE not in names and (command := next((s for s in _strings(data) if s.startswith(f"{PIPE}:")), None)):
        raise UsageError(
            f"data: {command!r} would run a command of the shell; if you trust it, add {OPTION} {PIPE} "
            f"or set {VARIABLE}={PIPE}"
        )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping) or hasattr(value, "__dict__"):
        for inner in (value if isinstance(value, Mapping) else vars(value)).values():
            yield from _strings(inner)
    elif isinstance(value, (list, tuple, set)):
        for inner in value:
            yield from _strings(inner)
