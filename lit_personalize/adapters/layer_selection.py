"""Which layers an adapter changes: by name, by pattern, or by a file that lists them.

A layer is `<component>.<module path>`. An entry is its name, the end of its name from a dot on, or a regular
expression for either; so `attn2.to_k`, `up_blocks.0.attentions.1.*` and `unet.conv_in` are entries.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from torch import nn

from lit_personalize.adapters.shadow import weight_layers
from lit_personalize.errors import UsageError

Value = TypeVar("Value")


def read_entries(path: Path) -> list[str]:
    """Entries of a file, one a line; `#` begins a comment.

    Raises:
        UsageError: It is not UTF-8, or holds no entry.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 (offset {error.start}); a list of layers is a text file") from error
    if not (entries := [entry for line in lines if (entry := line.partition("#")[0].strip())]):
        raise UsageError(f"{path} names no layer; write one name or pattern a line")
    return entries


def entries_of(given: str | Sequence[str], sets: Mapping[str, list[str]], what: str) -> list[str]:
    """What an option names: a set, a file of entries, or the entries themselves.

    Raises:
        UsageError: Neither a set nor a file has that name.
    """
    if not isinstance(given, str):
        return list(given)
    if given in sets:
        return sets[given]
    if Path(given).is_file():
        return read_entries(Path(given))
    known = ", ".join(sets)
    raise UsageError(f"unknown {what} {given!r}; use one of {known}, a file of layer names, or a list of names")


def compiled(entry: str) -> re.Pattern[str]:
    """The pattern that a whole layer name must match.

    Raises:
        UsageError: The entry is no regular expression.
    """
    try:
        return re.compile(rf"(?:.*\.)?(?:{entry})")
    except re.error as error:
        raise UsageError(f"{entry!r} is no layer name or regular expression: {error}") from error


def fitting(layers: Collection[str], entry: str) -> list[str]:
    """Layers that an entry names, in their order."""
    if entry in layers:  # lists of hundreds of whole names stay cheap
        return [entry]
    pattern = compiled(entry)
    return [layer for layer in layers if pattern.fullmatch(layer)]


def select(layers: Iterable[str], entries: Sequence[str], what: str, strict: bool) -> list[str]:
    """Layers that one of the entries names, in their order.

    Args:
        strict: Refuse an entry without a layer; sets that serve several families are not strict.

    Raises:
        UsageError: No layer is named, or a strict entry names none.
    """
    known = dict.fromkeys(layers)
    found: set[str] = set()
    for entry in entries:
        named = fitting(known, entry)
        if strict and not named:
            raise UsageError(
                f"{what}: {entry!r} matches no layer of this base; an entry is a layer's name, its end from a dot on, "
                "or a regular expression for one"
            )
        found.update(named)
    if not found:
        raise UsageError(f"{what} {list(entries)[:5]} match no layer of this base")
    return [layer for layer in known if layer in found]


def inside(layers: Iterable[str], blocks: Sequence[str]) -> list[str]:
    """Layers below one of the blocks, given as `up_blocks.0.attentions.1` or with their component.

    Raises:
        UsageError: A block has no such layer.
    """
    known = list(layers)
    found: set[str] = set()
    for block in blocks:
        prefixes = (f"{block}.", f"unet.{block}.")
        below = [layer for layer in known if layer.startswith(prefixes)]
        if not below:
            raise UsageError(f"in_blocks: no chosen layer of this base lies in {block!r}")
        found.update(below)
    return [layer for layer in known if layer in found]


def per_layer(layers: Collection[str], values: Mapping[str, Value], what: str) -> dict[str, Value]:
    """The value of every layer that an entry names; the first entry that does wins.

    Raises:
        UsageError: An entry names none of the layers.
    """
    found: dict[str, Value] = {}
    for entry, value in values.items():
        named = fitting(layers, entry)
        if not named:
            raise UsageError(f"{what}: {entry!r} matches none of the {len(layers)} layers that train")
        for layer in named:
            found.setdefault(layer, value)
    return found


def exactly(paths: Iterable[str]) -> str:
    """A regular expression for these module paths and no others, as PEFT takes it."""
    return "|".join(re.escape(path) for path in paths)


def changeable(components: Mapping[str, nn.Module]) -> list[str]:
    """Linear and convolution layers of UNet and text encoders, in module order."""
    parts = {name: module for name, module in components.items() if name != "vae"}
    return [f"{name}.{path}" for name, module in parts.items() for path in weight_layers(module)]
