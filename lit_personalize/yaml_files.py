"""YAML of people and of strangers: plain values alone, and no small file that becomes a huge one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lit_personalize.errors import UsageError

MOST_VALUES = 100_000
"""In a file once every alias is written out; ten lines of aliases of aliases make billions."""


def read_yaml(path: Path) -> Any:
    """The values of a file; tags that would make Python objects are refused.

    Raises:
        UsageError: It is not UTF-8, not YAML, or nested or multiplied beyond reason.
        OSError: It cannot be read.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        count = _count(found, {})
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 (offset {error.start}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise UsageError(f"{path} is not YAML: {where}{getattr(error, 'problem', error)}") from error
    except RecursionError as error:
        raise UsageError(f"{path} is nested too deeply to be a configuration; write it without such depth") from error
    if count > MOST_VALUES:
        raise UsageError(f"{path} holds more than {MOST_VALUES} values once its aliases (*name) are written out")
    return found


def _count(value: Any, known: dict[int, int]) -> int:
    """Values in a tree whose branches may be shared; a branch that holds itself has no end."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = MOST_VALUES + 1  # what it counts as within itself
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(item, known) for item in inner)
    return known[id(value)]
