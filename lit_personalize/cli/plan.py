"""`litp plan`: memory, steps, time and disk of a configuration, and why it could not be trained."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from lit_personalize.cli.console import add_json, configure_logging, emit

if TYPE_CHECKING:
    from lit_personalize.planning import Plan

STEPS = 20
WIDTH = 96


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="litp plan",
        description="Count what a configuration will take, without weights, pictures or a GPU, and name all that litp "
        "fit would refuse. All further options are those of litp fit (-c, --name, dotted keys). Exit code 2 if "
        "something is refused.",
    )
    parser.add_argument(
        "--memory", type=float, metavar="GB", help="say whether it fits a card of so many GB, and if not, what would"
    )
    parser.add_argument(
        "--probe", type=int, nargs="?", const=STEPS, default=0, metavar="STEPS",
        help=f"train some steps here (default: {STEPS}) to see how long they take; nothing of them is kept",
    )  # fmt: skip
    add_json(parser)
    options, rest = parser.parse_known_args(arguments)
    configure_logging()
    from lit_personalize.planning import plan

    found = plan(rest, options.memory, options.probe)
    if options.json:
        emit(found.report(), True)
    else:
        show(found)
    for reason in found.refused:
        print(f"litp plan: refused: {reason}", file=sys.stderr)
    return 2 if found.refused else 0


def size(count: int | None) -> str:
    """Bytes with three digits: 5.14 GB."""
    if count is None:
        return "unknown"
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"


def number(count: int) -> str:
    """Of parameters: 859.5 M."""
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,}"


def lasting(seconds: float) -> str:
    """Seconds as 1 h 05 min, 3 min 20 s or 4.2 s."""
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def show(found: Plan) -> None:
    """One table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), title=title(found), title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for heading, rows in sections(found):
        for i, row in enumerate(rows):
            table.add_row("" if i else heading, *row)
    console = Console(width=WIDTH, highlight=False)
    console.print(table)
    for note in found.notes:
        console.print(f"note: {note}", markup=False)


def title(found: Plan) -> str:
    where = f"{found.devices} {found.accelerator.upper()}{'s' if found.devices > 1 else ''}"
    return f"run {found.run}: {where}, {found.strategy}"


Row = tuple[str, str, str]


def sections(found: Plan) -> list[tuple[str, list[Row]]]:
    """Heading, and rows of name, figure and remark."""
    device, told = found.device, found.schedule
    parameters = [(name, number(n), found.types.get(name, "")) for name, n in found.parameters.items()]
    memory = [(name, size(n), "") for name, n in device.resident.items()]
    memory.append(("gradients", size(device.gradients), ""))
    memory.append(("saved activations", size(device.saved), "for the backward pass"))
    memory += [(f"peak, {phase}", size(n), "modelled") for phase, n in device.phases.items()]
    view, pictures = found.pictures.view, found.pictures
    batch = f"{view.instances} + {view.priors} regularization" if view.priors else f"{view.instances}"
    per_step = told["instances_per_step"]
    shown = told["shown_per_picture"]
    steps = [
        ("optimizer steps", f"{told['optimizer_steps'] or 'unknown'}", f"{per_step} instances each"),
        ("batch per device", batch, "{1} x {0} pixels".format(*view.shape)),
    ]
    if pictures.concepts is not None:
        beside = f", {pictures.regularization} for regularization" if pictures.regularization else ""
        often = f"each shown {shown:,.0f} times{beside}" if shown else ""
        steps.append(("pictures", f"{pictures.concepts}", often))
    files = [(name, size(n), "at most" if name != "checkpoint" else "each") for name, n in found.disk.items() if n]
    out: list[tuple[str, list[Row]]] = [
        ("parameters", parameters), ("memory per device", memory), ("steps", steps), ("time", times(found)),
        ("disk", files),
    ]  # fmt: skip
    if found.memory is not None:
        out.append(("card", fits(found, found.memory)))
    return out


def times(found: Plan) -> list[Row]:
    """What the probe measured, or how to have it."""
    if found.probe is None:
        return [("a step", "unknown", f"--probe trains {STEPS} steps here to see")]
    probe, steps = found.probe, found.schedule["optimizer_steps"]
    rows = [
        ("start", lasting(probe["start_seconds"]), "data, latents, text states"),
        ("a step", lasting(probe["step_seconds"]), f"measured here on one {probe['device']}, {probe['steps']} steps"),
    ]
    if steps:
        whole = probe["start_seconds"] + steps * probe["step_seconds"]
        rows.append(("all steps", lasting(whole), "without samples, checkpoints, exports"))
    if probe["peak_bytes"]:
        rows.append(("peak memory", size(probe["peak_bytes"]), "measured by the same steps"))
    return rows


def fits(found: Plan, memory: int) -> list[Row]:
    """Whether a card of so many bytes is large enough, and what would make it so."""
    ok = found.device.peak <= memory
    rows: list[Row] = [("of " + size(memory), "fits" if ok else "too small", f"needs {size(found.device.peak)}")]
    for one in found.instead:
        verdict = "fits" if one["fits"] else "too small"
        keys: dict[str, Any] = one["set"]
        told = ", ".join(f"{k.replace('init_args.', '')}: {str(v).lower()}" for k, v in keys.items())
        rows.append((f"with {one['change']}", verdict, f"{size(one['peak'])}; {told}"))
    return rows
