"""`litp gallery`: a static page of adapters with their pictures and files, for sharing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lit_personalize.cli.console import add_device, add_json, configure_logging, emit

if TYPE_CHECKING:
    from lit_personalize.gallery.cards import Card


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="litp gallery", description="Write a page of adapters: cards, samples, files."
    )
    parser.add_argument(
        "places", nargs="+", type=Path, metavar="RUN|FOLDER|FILE", help="runs, a folder of them, or files"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("gallery"), help="folder for index.html and all it shows"
    )
    parser.add_argument("--title", default="Adapters")
    parser.add_argument("--no-files", action="store_true", help="show sizes only, and copy no adapter file")
    parser.add_argument("--draw", action="store_true", help="draw samples anew instead of taking the runs' newest")
    parser.add_argument(
        "--prompts", nargs="+", default=[], help="with --draw: instead of the runs' own; {token} is filled in"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="with --draw")
    parser.add_argument("--steps", type=int, default=None, help="with --draw; default: as the run drew, else 25")
    parser.add_argument("--guidance", type=float, default=None, help="with --draw; default: as the run drew, else 6")
    parser.add_argument("--base", default=None, help="with --draw; default: the base that the run names")
    add_json(parser)
    add_device(parser)
    return parser


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    configure_logging()
    from lit_personalize.errors import UsageError
    from lit_personalize.gallery.cards import find_cards
    from lit_personalize.gallery.gallery_page import places_of, write_gallery

    if options.prompts and not options.draw:
        raise UsageError("--prompts are of pictures that are drawn anew: add --draw")
    cards = find_cards(options.places)
    if options.draw:
        for card, place in zip(cards, places_of(cards), strict=True):
            _draw(card, options, options.output / place / "drawn")
    page = write_gallery(cards, options.output, options.title, not options.no_files)
    if options.json:
        described = [
            {"name": c.name, "pictures": len(c.samples), "bytes": c.size, "verified": c.verified} for c in cards
        ]
        emit({"page": str(page), "cards": described}, True)
    else:
        print(page)
    return 0


def _draw(card: Card, options: argparse.Namespace, folder: Path) -> None:
    """Replace a card's samples by new ones, kept in `folder`."""
    from lit_personalize.backbones.loading import load_base
    from lit_personalize.devices import device_of
    from lit_personalize.errors import UsageError
    from lit_personalize.gallery.cards import Sample, prompts_for
    from lit_personalize.gallery.sample_page import write_cells
    from lit_personalize.sampling.cells import draw_cells, source_of
    from lit_personalize.sampling.sampler import SamplingOptions

    base = options.base or card.base_path
    if not base:
        raise UsageError(f"{card.source} does not say where its base is; name it with --base")
    given = {key: getattr(options, key) for key in ("steps", "guidance") if getattr(options, key) is not None}
    cells = draw_cells(
        lambda: load_base(base, device=device_of(options.device)), prompts_for(card, options.prompts), options.seeds,
        [[source_of(str(card.source))]], options=SamplingOptions(**{**card.drawing, **given}),
    )  # fmt: skip
    card.samples = [Sample(Path(d["file"]), d["prompt"], d["seed"]) for d in write_cells(cells, folder)]
