"""Measure the cells that a folder lacks, several at once, each in a process with its share of the cores."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from PIL import Image

from lit_personalize.atomic import replacing, write_text

Cell = tuple[str, str, int]
"""Method or kind of combination, what is learned, and seed."""


def run_missing(
    missing: Mapping[Cell, Path], pictured: int, end: float, jobs: int, run: Callable[..., dict[str, Any]], *given: Any
) -> int:
    """Measure cells in their order, started before the time `end`; the number of those that failed.

    Args:
        missing: Where the figures of each cell go, a JSON file; beside it a PNG.
        pictured: Seed whose pictures are kept: one is enough to look at.
        run: Called with a cell and `given`; gives figures and "shown", uint8 `[H, W, 3]`.
    """
    waiting, failed = list(missing), 0
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=_begin_worker, initargs=(threads,)
    ) as pool:
        running: dict[Future[dict[str, Any]], Cell] = {}
        while running or (waiting and time.monotonic() < end):
            while waiting and len(running) < jobs and time.monotonic() < end:
                cell = waiting.pop(0)
                running[pool.submit(run, *cell, *given)] = cell
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(done)
                named = "{}, {}, seed {}".format(*cell)
                error = done.exception()
                if isinstance(error, BrokenExecutor):
                    raise error
                if error is not None:  # the others go on
                    failed += 1
                    print(f"{named}: failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    continue
                result = done.result()
                shown = result.pop("shown")
                if cell[2] == pictured:
                    with replacing(missing[cell].with_suffix(".png")) as temporary:
                        Image.fromarray(shown).save(temporary)
                write_text(missing[cell], json.dumps(result, indent=2) + "\n")
                print(f"{named}: {result['seconds']} s", file=sys.stderr, flush=True)
    return failed


def _begin_worker(threads: int) -> None:
    import torch

    from lit_personalize.cli.console import configure_logging

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a traceback; the parent says the rest
    configure_logging()
    torch.set_num_threads(threads)
