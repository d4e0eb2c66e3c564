"""Lists of a later configuration, and optimizers of another class, replace those of an earlier one whole.

The parser merges mappings key by key, and so it does with the entries of two lists of the same length: a concept would
take the `class_noun` of the concept that stood at its place before; and Adam, given with a learning rate alone, the
`weight_decay` of the AdamW before it. Emptying a key before it is given again ends that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

CONFIG = ("-c", "--config")
CLASSES = (".optimizer", ".lr_scheduler")
"""Keys whose options are those of the class that they name."""


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
