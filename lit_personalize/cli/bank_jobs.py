"""`litp bank plan|status|retry`: the job table of a bank, without training. `status` and `retry` need no torch."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_personalize.cli.console import add_json, configure_logging, emit
from lit_personalize.errors import DataError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from lit_personalize.bank.progress import Progress

SHOWN = 20
"""Failures that a table has."""


def add_plan_verb(parser: argparse.ArgumentParser) -> None:
    from lit_personalize.cli.bank_plan import add_plan

    people = "folder with a folder of pictures for each adapter; .csv with columns id and images; or tar shards with "
    parser.add_argument("source", metavar="PEOPLE", help=f"{people}ID/NAME.jpg, such as 'people-{{000..031}}.tar'")
    add_plan(parser)
    add_json(parser)


def plan_verb(options: argparse.Namespace, rest: list[str]) -> int:
    from lit_personalize.cli.bank_plan import plan

    configure_logging()
    report = plan(options, rest)
    emit(report if options.json else {**report, "left out": len(report["left out"])}, options.json)
    if not options.json:
        for reason in report["left out"]:
            print(f"left out: {reason}", file=sys.stderr)
    return 0


def add_status(parser: argparse.ArgumentParser) -> None:
    from lit_personalize.bank.claims import EXPIRY

    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--watch", action="store_true", help="again and again, until nothing is left or Ctrl-C")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks")
    parser.add_argument("--expiry", type=float, default=EXPIRY, help="that of litp bank run")
    add_json(parser)


def status(options: argparse.Namespace, rest: list[str]) -> int:
    from lit_personalize.bank import job_table
    from lit_personalize.bank.progress import Watch

    nothing_more(rest)
    rows = job_table.read(options.folder)
    watch = Watch(_ledger(options.folder), [row.id for row in rows], options.expiry)
    if options.watch and not options.json:
        return _watch(watch, options.folder, options.every)
    while True:
        seen = watch.look()
        if options.json:
            emit(seen.report(), True)
        else:
            from lit_personalize.cli.run_tables import console

            console().print(table_of(seen, options.folder))
        if not options.watch or seen.done + len(seen.failed) == seen.adapters:
            return 0
        time.sleep(options.every)


def _watch(watch: Any, folder: Path, every: float) -> int:
    from rich.live import Live

    from lit_personalize.cli.run_tables import console

    with Live(console=console(), auto_refresh=False) as live:
        while True:
            seen = watch.look()
            live.update(table_of(seen, folder), refresh=True)
            if seen.done + len(seen.failed) == seen.adapters:
                return 0
            time.sleep(every)


def table_of(seen: Progress, folder: Path) -> Table:
    """Counts, rates, who trains what, and what failed."""
    from rich.table import Table

    from lit_personalize.bank.progress import clock

    def rate(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    training = sum(len(one.adapters) for one in seen.running)
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False, title=f"bank {folder}", title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    share = f" ({100 * seen.done / seen.adapters:.1f} %)" if seen.adapters else ""
    table.add_row("[green]done", f"{seen.done} of {seen.adapters}{share}")
    table.add_row("[cyan]in training", f"{training} in {len(seen.running)} processes")
    table.add_row("waiting", str(seen.waiting))
    table.add_row("[red]failed", str(len(seen.failed)))
    table.add_row("adapters/hour", f"{rate(seen.per_hour)} in the last hour, {rate(seen.per_hour_in_all)} in all")
    table.add_row("time left", clock(seen.eta))
    for one in seen.running:
        again = [f"{name} (attempt {seen.attempts[name]})" for name in one.adapters if name in seen.attempts]
        where = f"{one.worker} on {one.host}{f', job {one.job}' if one.job else ''}"
        told = f"{len(one.adapters)} in training, heartbeat {one.silent:.0f} s ago"
        table.add_row(where, told + (f"; {', '.join(again[:3])}{' ...' if len(again) > 3 else ''}" if again else ""))
    for name, reason in list(seen.failed.items())[:SHOWN]:
        table.add_row(f"[red]{name}", reason)
    if len(seen.failed) > SHOWN:
        table.add_row("", f"and {len(seen.failed) - SHOWN} more; --json has all")
    return table


def add_retry(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("ids", metavar="ID", nargs="*", help="adapters that failed; default: all of them")
    add_json(parser)


def retry(options: argparse.Namespace, rest: list[str]) -> int:
    """Put failed adapters back, for processes that run now or later."""
    from lit_personalize.bank import job_table

    nothing_more(rest)
    known = {row.id for row in job_table.read(options.folder)}
    ledger = _ledger(options.folder)
    seen = ledger.snapshot()
    if strange := [name for name in options.ids if name not in known]:
        raise DataError(f"{', '.join(strange)}: no such adapter in {options.folder}")
    if fine := [name for name in options.ids if not seen.is_failed(name)]:
        state = "finished" if fine[0] in seen.done else "in training" if seen.is_held(fine[0]) else "waiting"
        raise UsageError(f"{fine[0]} did not fail, it is {state}: name adapters that litp bank status lists as failed")
    wanted = options.ids or sorted(name for name in seen.attempts if seen.is_failed(name))
    back = {name: seen.attempts[name] for name in wanted if ledger.retry(name, seen.attempts[name])}
    if options.json:
        emit({"put back": len(back), "attempts": back}, True)
    else:
        emit({"put back": len(back), **{name: f"failed {n} times" for name, n in back.items()}}, False)
    return 0


def _ledger(folder: Path) -> Any:
    from lit_personalize.bank.claims import JOBS, Ledger

    return Ledger(folder / JOBS)


def nothing_more(rest: list[str]) -> None:
    """Refuse options that a verb does not know."""
    if rest:
        raise UsageError(f"{rest[0]} is no option of this verb; see its --help")
