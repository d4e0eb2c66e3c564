"""Which path and which tile a case takes: looked up in what was measured on GPUs of this name, and never measured here.

Tables are files of `lit_kernels.table_files`.

A case is an operator, a dtype and sizes in the operator's own words. Sizes that choose what is compiled (`SAME`) must
be those of the entry; any other goes to the nearest one of the table, by ratio, and the nearest entry to them is taken.
Without a table or such an entry a case takes the kernels with their default tiles: an unknown GPU is no error.

Lookups are cached. `torch.compile` traces them: it asks on which side of a few limits a size lies, and only where the
table prefers different paths for different sizes.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from lit_kernels.table_files import FOLDER, Entry, Key, file_of, own_folder, read

SAME = frozenset({"rank", "head_width", "keys"})
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def constant_while_traced(function: F) -> F:
    """Have `torch.compile` call the function and keep what it returns, as `torch.compiler.assume_constant_result` does.

    That one imports the compiler, and Triton with it, seconds that `import lit_kernels` must not take.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def padded_rank(rank: int) -> int:
    """A rank as kernels are compiled for it: 16 or 64, so that what runs is a form that was looked at."""
    return 16 if rank <= 16 else 64


def path(key: Key, device: torch.device) -> str:
    """ "triton", or "fallback" where that was faster.

    Raises:
        ValueError: The GPU's table cannot be read.
    """
    if not torch.compiler.is_compiling():  # eager steps of small batches wait for the host
        return _known_path(key.operator, key.dtype, device, tuple(key.sizes.items()))
    return _path(key, device)


def _path(key: Key, device: torch.device) -> str:
    same = tuple((name, size) for name, size in key.sizes.items() if name in SAME)
    names = tuple(name for name in key.sizes if name not in SAME)
    settled, axes = _settled(key.operator, key.dtype, device, same, names)
    if settled:
        return settled
    places: tuple[int, ...] = ()
    for name, limits in axes:
        place = 0
        for limit in limits:
            if key.sizes[name] > limit:
                place += 1
        places += (place,)
    return _path_at(key.operator, key.dtype, device, same, names, places)


def check(device: torch.device) -> None:
    """Read the device's table, if it has one: what is wrong with it is told now and not in the midst of a step.

    Raises:
        ValueError: The GPU's table cannot be read.
    """
    _entries(gpu_of(device))


def tile(key: Key, part: str, device: torch.device, offered: Sequence[T]) -> T:
    """The one of the tiles that was fastest; the first where nothing is known, or what is known is offered no more.

    Args:
        part: "forward" or "backward".
        offered: Told apart by `str`.

    Raises:
        ValueError: The GPU's table cannot be read.
    """
    if _trial is not None:
        _trial.offered[key.operator, part] = [str(one) for one in offered]
        wanted = _trial.tiles.get((key.operator, part), "")
    else:
        wanted = _tile(key.operator, key.dtype, tuple(key.sizes.items()), part, device)
    return next((one for one in offered if str(one) == wanted), offered[0]) if wanted else offered[0]


@dataclass
class Trial:
    """What runs inside `trying`: the tiles that it shall take, and what it asked for."""

    tiles: Mapping[tuple[str, str], str]
    """By operator and part, in place of the table's."""
    asked: list[Key] = field(default_factory=list)
    offered: dict[tuple[str, str], list[str]] = field(default_factory=dict)


_trial: Trial | None = None


@contextlib.contextmanager
def trying(tiles: Mapping[tuple[str, str], str] | None = None) -> Iterator[Trial]:
    """Run operators with these tiles, by operator and part, and note what they ask for; the table is not read."""
    global _trial
    before, _trial = _trial, Trial(tiles or {})
    try:
        yield _trial
    finally:
        _trial = before


def noted(key: Key) -> None:
    """Tell a trial which case runs."""
    if _trial is not None:
        _trial.asked.append(key)


def forget() -> None:
    """Read tables anew at the next lookup."""
    for cached in (gpu_of, _entries, _alike, _settled_of, _path_of, _known_path, _tile):
        cached.cache_clear()


@functools.cache
def gpu_of(device: torch.device) -> str:
    """The GPU's name; empty for other devices."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


@functools.cache
def _entries(gpu: str) -> tuple[Entry, ...]:
    for folder in (own_folder(), FOLDER) if gpu else ():
        if (file := file_of(gpu, folder)).exists():
            return tuple(read(file))
    return ()


Same = tuple[tuple[str, int], ...]
Names = tuple[str, ...]


@functools.lru_cache(maxsize=4096)
def _known_path(operator: str, dtype: torch.dtype, device: torch.device, sizes: Same) -> str:
    return _path(Key(operator, dtype, dict(sizes)), device)


@functools.cache
def _alike(operator: str, dtype: torch.dtype, device: torch.device, same: Same) -> tuple[Entry, ...]:
    """Entries that may stand for a case: those of its operator and dtype that have these very sizes."""
    name = str(dtype).removeprefix("torch.")
    mine = [e for e in _entries(gpu_of(device)) if (e.operator, e.dtype) == (operator, name)]
    return tuple(e for e in mine if all(e.sizes.get(which) == size for which, size in same))


def _axes(entries: Sequence[Entry], names: Sequence[str]) -> dict[str, list[int]]:
    """The different values, in order, of those sizes that all entries have."""
    return {name: sorted({e.sizes[name] for e in entries}) for name in names if all(name in e.sizes for e in entries)}


def _limits(values: Sequence[int]) -> tuple[int, ...]:
    """The largest sizes that are no nearer to the next value: geometric means, rounded down."""
    return tuple(math.isqrt(a * b) for a, b in zip(values, values[1:], strict=False))


def _nearest(entries: Sequence[Entry], sizes: Mapping[str, int]) -> Entry:
    """By the sum of squared logarithms of ratios."""
    return min(entries, key=lambda e: sum(math.log(e.sizes[name] / size) ** 2 for name, size in sizes.items()))


@constant_while_traced
def _settled(operator: str, dtype: torch.dtype, device: torch.device, same: Same, names: Names) -> tuple[str, Any]:
    return _settled_of(operator, dtype, device, same, names)


@functools.cache
def _settled_of(operator: str, dtype: torch.dtype, device: torch.device, same: Same, names: Names) -> tuple[str, Any]:
    """The path if it is one whatever the other sizes; else the limits between their values, by size."""
    entries = _alike(operator, dtype, device, same)
    if len(paths := {entry.path for entry in entries}) < 2:
        return (paths or {"triton"}).pop(), ()
    return "", tuple((name, _limits(values)) for name, values in _axes(entries, names).items())


@constant_while_traced
def _path_at(
    operator: str, dtype: torch.dtype, device: torch.device, same: Same, names: Names, places: tuple[int, ...]
) -> str:
    return _path_of(operator, dtype, device, same, names, places)


@functools.cache
def _path_of(
    operator: str, dtype: torch.dtype, device: torch.device, same: Same, names: Names, places: tuple[int, ...]
) -> str:
    entries = _alike(operator, dtype, device, same)
    axes = _axes(entries, names).items()
    return _nearest(entries, {name: values[at] for (name, values), at in zip(axes, places, strict=True)}).path


@functools.lru_cache(maxsize=4096)
def _tile(operator: str, dtype: torch.dtype, sizes: Same, part: str, device: torch.device) -> str:
    """The name of the fastest tile of the nearest entry that has one for this part; empty without such an entry."""
    same = tuple((name, size) for name, size in sizes if name in SAME)
    entries = [e for e in _alike(operator, dtype, device, same) if part in e.tiles]
    if not entries:
        return ""
    asked, near = dict(sizes), {}
    for name, values in _axes(entries, [name for name in asked if name not in SAME]).items():
        near[name] = values[sum(asked[name] > limit for limit in _limits(values))]
    return _nearest(entries, near).tiles[part]
