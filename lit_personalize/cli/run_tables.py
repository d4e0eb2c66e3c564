"""Runs and their comparison as tables of a terminal, readable at 100 columns."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from lit_personalize.run_comparison import Comparison, Figure
    from lit_personalize.run_state import RunState

COLOURS = {"finished": "green", "running": "cyan", "preempted": "yellow", "killed": "red", "failed": "red"}
SIDE_BY_SIDE = 4
"""Runs that stand in columns; of more each has a row."""
WIDE = 5
"""Keys that stand before figures in a table of many runs."""
NONE = "-"


def console() -> Console:
    """For results: as wide as the terminal, or 100 columns in a file."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100, highlight=False)


def runs_table(states: Sequence[RunState], more: Mapping[str, Sequence[str]] | None = None) -> Table:
    """One row per run.

    Args:
        more: Further columns, which come after the name.
    """
    from lit_personalize.gallery.pages import size

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("run", overflow="fold")
    for title in more or {}:
        table.add_column(title)
    for title, side in (("state", "left"), ("step", "right"), ("loss", "right"), ("job", "left"),
                        ("adapters", "right"), ("size", "right"), ("updated", "left")):  # fmt: skip
        table.add_column(title, justify="right" if side == "right" else "left", no_wrap=True)
    for number, state in enumerate(states):
        reached = f"{state.step}/{state.steps}" if state.steps else str(state.step)
        table.add_row(
            state.name, *(column[number] for column in (more or {}).values()), coloured(state.state), reached,
            shown(state.loss), state.job or NONE, str(len(state.exports)), size(state.bytes), ago(state.updated),
        )  # fmt: skip
    return table


def print_comparison(made: Comparison, by: str = "") -> None:
    """Print every difference of a few runs side by side, or of many the main ones in a row each."""
    out = console()
    names = [state.name for state in made.runs]
    configuration, within = by_themselves(made.configuration)
    if len(names) <= SIDE_BY_SIDE:
        _print_few(out, made, configuration, names)
    else:
        _print_many(out, made, configuration, by or "loss", names)
    if within:
        out.print(Text(f"{within} keys that not all of these classes have: --json, --html", style="dim"))
    for key, row in made.environment.items() if len(names) > SIDE_BY_SIDE else ():
        out.print(Text(f"{key}: {grouped(dict(zip(names, (value_of(key, v) for v in row), strict=True)))}"))
    for name, row in made.exports.items():
        known = [value for value in row if value]
        told = f"the same tensors in {'all' if len(known) == len(row) else f'the {len(known)} runs that have it'}"
        if len(known) < 2:
            told = f"in {len(known)} of {len(row)} runs"
        elif len(set(known)) > 1:
            told = f"{len(set(known))} different ones in {len(known)} runs"
        out.print(Text(f"exports/{name}: {told}"))
    if not made.exports:
        out.print("no run has exported anything")


def by_themselves(configuration: Mapping[str, list[Any]]) -> tuple[dict[str, list[Any]], int]:
    """Differences without those that follow from another class, and how many these are."""
    classes = [key.removesuffix("class_path") for key in configuration if key.endswith(".class_path")]
    kept = {
        key: row
        for key, row in configuration.items()
        if not (None in row and len({repr(value) for value in row if value is not None}) == 1
                and any(key.startswith(f"{name}init_args.") for name in classes))
    }  # fmt: skip
    return kept, len(configuration) - len(kept)


def _print_few(out: Console, made: Comparison, configuration: Mapping[str, list[Any]], names: list[str]) -> None:
    results: dict[str, list[Any]] = {
        "state": [coloured(state.state) for state in made.runs],
        "step": [f"{state.step}/{state.steps}" if state.steps else str(state.step) for state in made.runs],
    }
    results |= {name: [figure_text(figure) for figure in row] for name, row in made.figures.items()}
    out.print(_side_by_side("last (best at)", results, names))
    for title, table in (("configuration", configuration), ("environment", made.environment)):
        if table:
            labels = short_names(table, 2)
            rows = {labels[key]: [value_of(key, value) for value in row] for key, row in table.items()}
            out.print(_side_by_side(title, rows, names))
        else:
            out.print(f"{title}: the same in all")


def _print_many(
    out: Console, made: Comparison, configuration: Mapping[str, list[Any]], by: str, names: list[str]
) -> None:
    """A row per run; columns as far as the width goes, those that tell most first."""
    labels = short_names(configuration)
    whole = sorted(configuration, key=lambda key: None in configuration[key])  # what all have before what some have
    columns: dict[str, list[Any]] = {"run": names}
    states = [state.state for state in made.runs]
    if set(states) != {"finished"}:
        columns["state"] = [coloured(state) for state in states]
    columns["step"] = [str(state.step) for state in made.runs]
    wanted: list[tuple[str, list[Any]]] = [
        (labels[key], [value_of(key, value) for value in configuration[key]]) for key in whole[:WIDE]
    ]
    figures = sorted(made.figures, key=lambda name: (name != by, name == "images_per_second"))
    for name in figures:
        last = (name, [NONE if figure is None else shown(figure.last) for figure in made.figures[name]])
        if name == by:  # before the keys: it is what one looks for
            best = [NONE if f is None or f.at is None else f"{shown(f.best)} at {f.at}" for f in made.figures[name]]
            wanted[:0] = [last, ("at its best", best)]
        else:
            wanted.append(last)
    wanted += [(labels[key], [value_of(key, value) for value in configuration[key]]) for key in whole[WIDE:]]
    left = []
    for title, cells in wanted:
        used = sum(_width(name, column) for name, column in columns.items())
        if used + _width(title, cells) > out.width:
            left.append(title)
        else:
            columns[title] = cells
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in columns:
        table.add_column(title, justify="right" if title in made.figures or title == "step" else "left", no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    out.print(table)
    if left:
        told = f"{', '.join(left[:WIDE])}{f' and {len(left) - WIDE} more' if len(left) > WIDE else ''}"
        out.print(Text(f"not shown for want of width, but with --json and --html: {told}", style="dim"))


def _width(title: str, cells: Sequence[Any]) -> int:
    return max(len(title), *(len(cell) for cell in cells)) + 2


def _side_by_side(title: str, rows: Mapping[str, Sequence[Any]], names: Sequence[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in (title, *names):
        table.add_column(name, overflow="fold", no_wrap=name == title and len(names) <= 2)
    for name, row in rows.items():
        table.add_row(name, *row)
    return table


def grouped(values: Mapping[str, Any]) -> str:
    """`8 in a, b; 16 in c`, the commonest value first and without the names where it is most."""
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(shown(value), []).append(name)
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    return "; ".join(f"{value} in {', '.join(names) if len(names) <= 4 else f'{len(names)} runs'}"
                     for value, names in ordered)  # fmt: skip


def short_names(keys: Iterable[str], least: int = 1) -> dict[str, str]:
    """The shortest ending of each dotted key that no other has: `adapters.0.init_args.rank` is `rank`.

    Args:
        least: Parts that it has at least.
    """
    parts = {key: [part for part in key.split(".") if part != "init_args"] for key in keys}
    found = {}
    for key, own in parts.items():
        others = [other for name, other in parts.items() if name != key]
        counts = (n for n in range(min(least, len(own)), len(own)) if not own[-n].isdigit())
        count = next((n for n in counts if all(other[-n:] != own[-n:] for other in others)), len(own))
        found[key] = ".".join(own[-count:])
    return found


def figure_text(figure: Figure | None) -> str:
    """`0.1234 (0.1199 at 240)`; once where the last is the best."""
    if figure is None:
        return NONE
    if figure.at is None or figure.last == figure.best:
        return shown(figure.last)
    return f"{shown(figure.last)} ({shown(figure.best)} at {figure.at})"


def shown(value: Any) -> str:
    """A value in few characters."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return f"[{', '.join(shown(item) for item in value)}]"
    return NONE if value is None or value == "" else str(value).lower() if isinstance(value, bool) else str(value)


def value_of(key: str, value: Any) -> str:
    """A configuration's value as `shown`, classes and commits by their short names."""
    if isinstance(value, str) and key.endswith("class_path"):
        return value.rpartition(".")[2]
    return value[:10] if isinstance(value, str) and key.endswith(".commit") else shown(value)


def coloured(state: str) -> Text:
    return Text(state, style=COLOURS.get(state, ""))


def ago(time: str | None) -> str:
    """`3 min ago` of a time in ISO format."""
    if not time:
        return NONE
    seconds = max(0.0, (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds())
    for unit, length, most in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds < length * most:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds / 86400:.0f} days ago"
