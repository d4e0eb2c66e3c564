"""`litp sample`: draw pictures with a base and adapter files."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lit_personalize.cli.console import add_base, add_json, base_of, configure_logging, emit
from lit_personalize.sampling.schedulers import NAMES

if TYPE_CHECKING:
    from lit_personalize.backbones.base import Base
    from lit_personalize.sampling.cells import Source


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="litp sample", description="Draw pictures with a base and adapters.")
    parser.add_argument("prompts", nargs="+", help="one picture per prompt and seed")
    add_base(parser)
    parser.add_argument("--adapter", action="append", default=[], metavar="FILE|RUN[@STRENGTHS]",
                        help="may be repeated; strengths: 0.8 of all of it, 0.8,mid_block=0 also by block")  # fmt: skip
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0],
                        help="draw at each of these, times the adapters' own")  # fmt: skip
    parser.add_argument("--grid", action="store_true", help="draw each adapter by itself, side by side")
    parser.add_argument("--k-lora", nargs=2, metavar=("CONTENT", "STYLE"),
                        help="two LoRAs of which each layer applies one at a time, the style's later")  # fmt: skip
    parser.add_argument("--delayed", nargs=3, metavar=("ORIGINAL", "EDITED", "TIMESTEP"),
                        help="an adapter, and from a timestep of the noise schedule on, such as 700 of 1000, its "
                        "edit")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=6.0)
    parser.add_argument("--negative", default="")
    parser.add_argument(
        "--mix", type=float, nargs="+", metavar="ALPHA", default=None,
        help="draw between two prompts: text states (1 - ALPHA) of the first and ALPHA of the second",
    )  # fmt: skip
    parser.add_argument("--slerp", action="store_true", help="mix along the sphere, token by token")
    parser.add_argument("--scheduler", choices=NAMES, default="ddim", help="takes the steps")
    parser.add_argument("--resolution", type=int, default=None)
    parser.add_argument("--force", action="store_true", help="accept an adapter that was made for another base")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("samples"), help="folder for pictures, grid.png and index.html"
    )
    add_json(parser)
    return parser


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    configure_logging()
    from lit_personalize.errors import UsageError
    from lit_personalize.gallery.sample_page import write_cells
    from lit_personalize.sampling.cells import draw_cells, source_of
    from lit_personalize.sampling.mixing import Mix, Prompt
    from lit_personalize.sampling.sampler import SamplingOptions

    asked: list[Prompt] = list(options.prompts)
    if options.mix is not None:
        if len(asked) != 2:
            raise UsageError(f"--mix draws between two prompts, not {len(asked)}")
        first, second = options.prompts
        asked = [Mix(first, second, alpha, options.slerp) for alpha in options.mix]
    elif options.slerp:
        raise UsageError("--slerp says how --mix goes from one prompt to the other; give --mix 0 0.5 1")
    sources = [source_of(entry, options.force) for entry in options.adapter]
    if options.k_lora:
        sources.append(_k_lora(options.k_lora, options.force))
    if options.delayed:
        sources.append(_delayed(options.delayed, options.force))
    if not sources and (options.grid or options.strengths != [1.0]):
        raise UsageError("--grid and --strengths are of adapters: name one with --adapter")
    how = SamplingOptions(options.steps, options.guidance, options.negative, options.scheduler)
    groups = [[source] for source in sources] if options.grid else [sources]
    load = partial(base_of, options)
    cells = draw_cells(load, asked, options.seeds, groups, options.strengths, how, options.resolution)
    drawn = write_cells(cells, options.output)
    page, grid = options.output / "index.html", options.output / "grid.png"
    if options.json:
        emit({"pictures": drawn, "grid": str(grid), "page": str(page)}, True)
    else:
        print(*(picture["file"] for picture in drawn), grid, page, sep="\n")
    return 0


def _delayed(given: list[str], force: bool) -> Source:
    from lit_personalize.adapters.delayed import Delayed
    from lit_personalize.errors import UsageError
    from lit_personalize.export.loading import exports_of, read_adapter
    from lit_personalize.sampling.cells import Source

    *places, told = given
    try:
        timestep = float(told)
    except ValueError:
        raise UsageError(f"--delayed ORIGINAL EDITED TIMESTEP: {told!r} is no timestep, such as 700") from None

    def attach(base: Base) -> Delayed:
        original, edited = (read_adapter(exports_of(Path(place)), base, force) for place in places)
        adapter = Delayed(original, edited, timestep)
        adapter.attach(base)
        return adapter

    return Source(f"{Path(places[0]).name}, from {told} on {Path(places[1]).name}", attach)


def _k_lora(places: list[str], force: bool) -> Source:
    from lit_personalize.adapters.klora import KLoRA
    from lit_personalize.export.loading import exports_of, read_adapter
    from lit_personalize.sampling.cells import Source

    def attach(base: Base) -> KLoRA:
        content, style = (read_adapter(exports_of(Path(place)), base, force) for place in places)
        adapter = KLoRA(content, style)
        adapter.attach(base)
        return adapter

    return Source(f"K-LoRA of {' and '.join(Path(place).name for place in places)}", attach)
