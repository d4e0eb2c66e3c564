"""Measure a GPU's table (`lit_kernels.dispatch`): for each case its fastest tiles, and whether plain torch is faster.

Tiles of the two passes are independent, so each pass is timed by itself with each of its tiles. Then the kernels with
the best ones and the fallback run forward and backward together, as a training step does; an operator without gradients
runs forward alone. Only tiles that operators offer are tried: all of those compile without spills.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lit_kernels import dispatch, table_files
from lit_kernels.baselines import Baseline
from lit_kernels.measuring import Built, Case
from lit_kernels.timing import Bench, backward_of, do_bench

Tiles = dict[tuple[str, str], str]


def tune(
    cases: Iterable[Case], file: Path, gpu: str, device: torch.device, bench: Bench = do_bench
) -> Iterator[table_files.Entry]:
    """Add what is missing to a table, which is written after each case; yield what was added.

    Raises:
        ValueError: The file is there and is no table.
        OSError: It cannot be written.
    """
    entries = table_files.read(file) if file.exists() else []
    for case in cases:
        key = key_of(case)
        if any(entry.key == key for entry in entries):
            continue
        entries.append(measured(case.build(device), key, bench))
        table_files.write(file, gpu, entries)
        dispatch.forget()
        yield entries[-1]


def key_of(case: Case) -> table_files.Key:
    """What the operator looks a case up by; nothing is computed."""
    with dispatch.trying() as trial:
        case.build(torch.device("meta")).run("triton")
    return trial.asked[0]


def measured(built: Built, key: table_files.Key, bench: Bench) -> table_files.Entry:
    """The entry of one case."""
    way = Baseline(lambda: built.run("triton"), built.learning)
    tiles, tried = _best_tiles(way, key.operator, bench)
    best = {(key.operator, part): name for part, name in tiles.items()}
    fits = all(tried.values())
    kernels = _unless_too_large(lambda: _step_of(way), best, bench) if fits else None
    plain = bench(_step_of(Baseline(lambda: built.run("fallback"), built.learning)))
    return table_files.Entry(
        operator=key.operator,
        dtype=str(key.dtype).removeprefix("torch."),
        sizes=dict(key.sizes),
        path="fallback" if kernels is None or plain < kernels else "triton",
        triton_us=kernels,
        fallback_us=plain,
        tiles=tiles,
        tried_us=tried,
        measured=f"{datetime.now(UTC).date().isoformat()}, torch {torch.__version__}, triton {version('triton')}",
    )


def _best_tiles(way: Baseline, operator: str, bench: Bench) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """By part that has several tiles: the fastest of them, and the time of each that this GPU has room for."""
    from triton.runtime.errors import OutOfResources

    best: dict[str, str] = {}
    tried: dict[str, dict[str, float]] = {}
    for part in ("forward", "backward") if way.learning else ("forward",):
        make = (lambda: way.run) if part == "forward" else (lambda: backward_of(way))
        before = {(operator, other): name for other, name in best.items()}
        with dispatch.trying(before) as trial, contextlib.suppress(OutOfResources):
            _step_of(way)()
        names = trial.offered.get((operator, part), [])
        if len(names) < 2:
            continue
        times = {name: _unless_too_large(make, {**before, (operator, part): name}, bench) for name in names}
        tried[part] = {name: time for name, time in times.items() if time is not None}
        if tried[part]:
            best[part] = min(tried[part], key=tried[part].__getitem__)
    return best, tried


def _unless_too_large(make: Callable[[], Callable[[], Any]], tiles: Tiles, bench: Bench) -> float | None:
    """Time with these tiles; None where the GPU has too little shared memory or too few registers for one."""
    from triton.runtime.errors import OutOfResources

    with dispatch.trying(tiles):
        try:
            return bench(make())
        except OutOfResources:
            return None


def _step_of(way: Baseline) -> Callable[[], Any]:
    """Forward, and backward where something learns, as one step runs them."""
    return (lambda: backward_of(way)()) if way.learning else way.run

