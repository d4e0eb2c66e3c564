"""Lists of a later configuration, and optimizers of another class, replace those of an earlier one whole.

The parser merges mappings key by key, and so it does with the entries of two lists of the same length: a concept would
take the `class_noun` of the concept that stood at its place before; and Adam, given with a learning rate alone, the
`weight_decay` of the AdamW before it. Emptying a key before it is given again ends that.

One entry of a list is changed by its place, `--model.init_args.adapters.0.init_args.rank 8`: the parser knows lists as
a whole, and is given the whole list with that value in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_personalize.errors import UsageError

CONFIG = ("-c", "--config")
CLASSES = (".optimizer", ".lr_scheduler")
"""Keys whose options are those of the class that they name."""

ENTRY = re.compile(r"(?P<list>\w[\w.]*?)\.(?P<place>\d+)(?:\.(?P<inner>[\w.]+))?")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
"""That YAML reads as text unless it has both a point and a sign, such as 1e-4."""


def without_entries(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, Any]]]:
    """Take the options that change one entry of a list out of a command line: the rest, and their keys and values."""
    rest: list[str] = []
    entries: list[tuple[str, Any]] = []
    for flag, value, tokens in _options(arguments):
        if flag.startswith("--") and ENTRY.fullmatch(flag[2:]):
            if len(tokens) == 1 and "=" not in tokens[0]:
                raise UsageError(f"{flag} needs a value")
            entries.append((flag[2:], typed(value)))
        else:
            rest += tokens
    return rest, entries


def entry_options(config: dict[str, Any], entries: Sequence[tuple[str, Any]]) -> list[str]:
    """Options that give the lists of a resolved configuration, which is changed, with some entries in their places.

    Raises:
        UsageError: See `place`.
    """
    placed = dict(place(config, key, value) for key, value in entries)
    return [f"--{key}={json.dumps(value)}" for key, value in placed.items()]


def place(config: dict[str, Any], key: str, value: Any) -> tuple[str, Any]:
    """Put a value into a resolved configuration: what the parser is to be given for it, a key and a value.

    That is the key itself, or where an entry of a list is meant, the whole list.

    Raises:
        UsageError: The key names an entry that the list has not, or no list.
    """
    match = ENTRY.fullmatch(key)
    if match is None:
        return key, value
    found: Any = config
    for part in match["list"].split("."):
        found = found.get(part) if isinstance(found, dict) else None
    if not isinstance(found, list):
        raise UsageError(f"{key}: {match['list']} is no list of this configuration")
    number = int(match["place"])
    if number >= len(found):
        raise UsageError(f"{key}: {match['list']} has {len(found)} entries, counted from 0")
    if match["inner"] is None:
        found[number] = value
        return match["list"], found
    *parts, last = match["inner"].split(".")
    inner: Any = found[number]
    for part in parts:
        if isinstance(inner, list) and part.isdigit() and int(part) < len(inner):
            inner = inner[int(part)]
        elif isinstance(inner, dict):
            inner = inner.setdefault(part, {})
    if not isinstance(inner, dict):
        raise UsageError(f"{key}: there is no such place in {match['list']}")
    inner[last] = value
    return match["list"], found


def typed(text: str) -> Any:
    """A value of the command line as YAML has it, and 1e-4 a number; what is no YAML is text."""
    if NUMBER.fullmatch(text.strip()):
        return float(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def replace_lists(arguments: Sequence[str]) -> list[str]:
    """Insert `--KEY=[]` before each argument or `-c` file that gives a list of mappings which an earlier one gave.

    And `--KEY=null` before one that gives an optimizer of another class than an earlier one.

    Args:
        arguments: Of the command line, with readable YAML files behind -c. `--KEY+` still appends.
    """
    out: list[str] = []
    given: set[str] = set()
    classes: dict[str, str] = {}
    for flag, value, tokens in _options(arguments):
        prefix, text = ("", Path(value).read_text(encoding="utf-8")) if flag in CONFIG else (flag.lstrip("-"), value)
        loaded = _loaded(text)
        for key, name in _classes(loaded, prefix):
            place = key.replace(".init_args", "")
            if classes.get(place, name) != name:
                out.append(f"--{key}=null")
            classes[place] = name
        for key in _lists_of_mappings(loaded, prefix):
            name = key.replace(".init_args", "")
            if name in given:
                out.append(f"--{key}=[]")
            given.add(name)
        out += tokens
    return out


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Yield flag, value and tokens of every option; what stands alone has an empty value."""
    left = list(arguments)
    while left:
        token = left.pop(0)
        flag, equals, value = token.partition("=")
        if equals or not token.startswith("-"):
            yield flag, value, [token]
        elif left and (not left[0].startswith("-") or left[0].startswith("- ")):
            value = left.pop(0)
            yield flag, value, [token, value]
        else:
            yield flag, "", [token]


def _loaded(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:  # a plain string such as "a: b: c", which the parser takes or refuses as it is
        return None


def _lists_of_mappings(value: Any, key: str) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _lists_of_mappings(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and key and not key.endswith("+") and any(isinstance(item, dict) for item in value):
        yield key


def _classes(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Keys of optimizers in a configuration with their class's name, which stands alone or as `class_path`."""
    if isinstance(value, dict) and not key.endswith(CLASSES):
        for name, inner in value.items():
            yield from _classes(inner, f"{key}.{name}" if key else str(name))
        return
    named = value.get("class_path") if isinstance(value, dict) else value
    key = key.removesuffix(".class_path")
    if key.endswith(CLASSES) and isinstance(named, str):
        yield key, named.rpartition(".")[2]
