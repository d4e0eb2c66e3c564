"""`litp merge linear|concat|svd|ties|dare|magnitude|orthogonal|magmax`: merge adapter files without training."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_personalize.cli.console import add_base, add_json, base_of, configure_logging

if TYPE_CHECKING:
    from lit_personalize.merging.arithmetic import Mode

PRUNING = ("ties", "dare", "magnitude")


def build_parser(mode: Mode, text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"litp merge {mode}", description=text)
    parser.add_argument("adapters", nargs="*", metavar="PLACE[@STRENGTH[,BLOCK=STRENGTH]]",
                        help="files, folders or runs")
    add_cut(parser)
    parser.add_argument(
        "--block", action="append", default=[], metavar="[N:]PATTERN=FACTOR",
        help="strength of layers, of every adapter or of number N: up_blocks.1=0.5; may be repeated, the last counts",
    )  # fmt: skip
    parser.add_argument(
        "--rename", action="append", default=[], metavar="N:TOKEN=NEW", help="rename a token of adapter N; repeatable"
    )
    if mode in PRUNING:
        parser.add_argument("--density", type=float, default=None, help="share of elements to keep; ties 0.2, else 0.5")
        parser.add_argument(
            "--on", choices=("change", "factors"), default="change",
            help="elements of the change of each layer (the papers), or of its factors A and B (PEFT)",
        )  # fmt: skip
    if mode in ("ties", "dare"):
        parser.add_argument("--sign", choices=("total", "frequency"), default="total", help="how signs are elected")
    if mode == "dare":
        parser.add_argument("--elect", action="store_true", help="elect signs as TIES does, instead of summing")
        parser.add_argument("--seed", type=int, default=0, help="of the elements to drop")
    if mode == "orthogonal":
        parser.add_argument("--protect", type=float, default=1.0, help="share of energy whose inputs are kept free")
    add_output(parser)
    return parser


def add_cut(parser: argparse.ArgumentParser) -> None:
    """Add --rank and --energy."""
    cut = parser.add_mutually_exclusive_group()
    cut.add_argument("--rank", type=int, default=None, help="largest rank of a layer")
    cut.add_argument("--energy", type=float, default=None, help="share of each layer's energy to keep, such as 0.99")


def add_output(parser: argparse.ArgumentParser, adapters: bool = True) -> None:
    """Add what every merge needs to write and verify."""
    add_base(parser)
    if adapters:
        parser.add_argument("--force", action="store_true", help="accept an adapter that was made for another base")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the files and merge.json")
    parser.add_argument("--formats", nargs="+", default=["diffusers", "kohya"], help="diffusers kohya peft pipeline")
    parser.add_argument("--prompt", default=None, help="of the picture that is compared")
    parser.add_argument("--no-verify", action="store_true")
    add_json(parser)


def renames(entries: list[str]) -> dict[tuple[int, str], str]:
    """Read `N:TOKEN=NEW`.

    Raises:
        UsageError: It is something else.
    """
    from lit_personalize.errors import UsageError

    found = {}
    for entry in entries:
        number, _, names = entry.partition(":")
        old, _, new = names.rpartition("=")
        if not (number.isdecimal() and old and new):
            raise UsageError(f"--rename {entry}: write N:TOKEN=NEW, such as '2:<new1>=<new2>'")
        found[int(number), old] = new
    return found


def run(mode: Mode, text: str, arguments: list[str]) -> int:
    given = build_parser(mode, text).parse_args(arguments)
    configure_logging()
    from lit_personalize.merging.arithmetic import MergeOptions, check
    from lit_personalize.merging.merge import merge
    from lit_personalize.sampling.cells import split_strengths

    names = ("rank", "energy", "density", "on", "sign", "elect", "seed", "protect")
    options: dict[str, Any] = {name: getattr(given, name) for name in names if hasattr(given, name)}
    parsed = [split_strengths(entry) for entry in given.adapters]
    adapters = [(path, strength) for path, strength, _ in parsed]
    own = [f"{n}:{part}={factor}" for n, (_, _, parts) in enumerate(parsed, 1) for part, factor in parts.items()]
    check(mode, len(adapters), MergeOptions(**options))  # before the base is loaded
    report = merge(
        mode, adapters, given.output, base_of(given),
        blocks=[*given.block, *own], renames=renames(given.rename), formats=given.formats, verify=not given.no_verify,
        force=given.force, prompt=given.prompt, **options,
    )  # fmt: skip
    show(report, given.json)
    return 0


def show(report: Any, as_json: bool) -> None:
    """Print a report: where the files are, what they keep, what verification found."""
    if as_json:
        print(report.to_json(), end="")
        return
    for number, adapter in enumerate(report.adapters, 1):
        left = f", {adapter['left']:.1%} of its energy left" if "left" in adapter else ""
        left += f", {adapter['neurons']} neurons" if "neurons" in adapter else ""
        print(f"{number}  {adapter['name']} @ {adapter['strength']:g}, {adapter['layers']} layers{left}")
    ranks = ", ".join(f"{count} of rank {rank}" for rank, count in report.ranks.items())
    print(f"{report.mode}: {report.layers} layers{f' ({ranks})' if ranks else ''}, tokens {report.tokens or 'none'}")
    if report.worst_layer:  # else the merge is exact by its own arithmetic
        print(f"kept {report.energy_kept:.4%} of the energy; {report.worst_layer} the least, {report.worst_kept:.4%}")
    for key, value in report.extra.items():
        print(f"{key}: {value}")
    if report.verified is not None:
        print(f"verified in the stock client, largest relative error {report.verified['largest_error']:.1e}")
    print(*(f"{report.output}/{name}" for name in report.files), sep="\n")


TEXTS: dict[Mode, str] = {
    "linear": "The weighted sum of adapters, exact at its own rank, or the best of a smaller rank.",
    "concat": "The weighted sum of adapters, exact, with their ranks side by side.",
    "svd": "The weighted sum of adapters at the largest of their ranks, or another; one adapter alone is truncated.",
    "ties": "TIES-Merging: keep large elements, elect a sign, average what agrees.",
    "dare": "DARE: drop elements at random, rescale the rest, sum.",
    "magnitude": "Keep the largest elements of every adapter, sum.",
    "orthogonal": "The sum, later adapters without what they do to inputs that earlier ones answer.",
    "magmax": "MagMax: each element of the adapter that changes it most.",
}
linear, concat, svd, ties, dare, magnitude, orthogonal, magmax = (partial(run, m, text) for m, text in TEXTS.items())
