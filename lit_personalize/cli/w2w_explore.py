"""`litp w2w explore`: a page of a space of adapters that works without a server."""

from __future__ import annotations

import argparse
from pathlib import Path

from lit_personalize.cli.console import configure_logging, emit
from lit_personalize.cli.w2w_space import POINT, add_directions, add_space, open_space


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="litp w2w explore",
        description="Write one HTML file that needs no network: a scatter of the corpus on chosen components, "
        "directions of its labels with pictures along them, and the nearest adapters of each.",
    )
    add_space(parser, "gives labels")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the HTML file")
    parser.add_argument("--title", default="", help="default: the space's name")
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="shown; default: all of the corpus")
    add_directions(parser)
    parser.add_argument("--prompt", help="draw pictures along directions with this prompt")
    parser.add_argument("--strips", nargs="+", metavar="LABEL", help="whose directions; default: the four that are "
                        "best read from weights")  # fmt: skip
    parser.add_argument("--of", default="mean", metavar="ADAPTER", help=f"where strips begin: {POINT}")
    parser.add_argument("--by", type=float, nargs="+", default=[-3, -1.5, 0, 1.5, 3], metavar="ALPHA",
                        help="how far, in the corpus's deviations")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=6.0)
    parser.add_argument("--pictures", type=Path, help="folder with ID.png or ID/ for the adapters")
    parser.add_argument("--embed", type=int, default=32, help="components in the page, by which it compares adapters")
    return parser


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    configure_logging()
    from lit_personalize.errors import UsageError
    from lit_personalize.gallery.space_page import figures_of, write_space
    from lit_personalize.sampling.sampler import SamplingOptions
    from lit_personalize.weights2weights.exploration import Exploration, directions_of, draw_strip, thumbnails_in
    from lit_personalize.weights2weights.points import point_of

    if options.embed < 2:
        raise UsageError(f"a scatter has two components: --embed 2 or more, not {options.embed}")
    if options.out.is_dir():
        raise UsageError(f"output {options.out} is a folder; name a file, such as {options.out / 'space.html'}")
    if options.strips and not options.prompt:
        raise UsageError("--strips draws pictures: say of what with --prompt")
    opened = open_space(options)
    space = opened.space
    labels = opened.labels() if opened.corpus is not None else {}
    if unknown := [name for name in (*(options.labels or ()), *(options.strips or ())) if name not in labels]:
        fix = f"the corpus has {', '.join(labels)}" if labels else "name the --corpus that has it"
        raise UsageError(f"there is no label {unknown[0]!r}; {fix}")
    if options.labels:
        labels = {name: values for name, values in labels.items() if name in {*options.labels, *(options.strips or ())}}
    made = Exploration(space, labels, directions_of(space, labels, options.method, options.components, options.folds))
    if options.pictures:
        made.thumbnails = thumbnails_in(options.pictures, space.ids)
    if options.prompt:
        by_name = {direction.name: direction for direction in made.directions}
        chosen = options.strips or [d.name for d in made.directions if d.classes][:4]
        if without := [name for name in chosen if name not in by_name]:
            raise UsageError(f"label {without[0]} gives no direction, so there are no pictures along it")
        point = point_of(space, options.of, opened.base, opened.corpus, options.force)
        how = SamplingOptions(options.steps, options.guidance)
        made.strips = [
            draw_strip(space, opened.base, point, by_name[name], options.by, options.prompt, options.seed, how)
            for name in chosen
        ]
        made.told = {"adapter": options.of, "prompt": options.prompt, "seed": options.seed}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    title = options.title or f"{len(space.ids)} adapters of {options.space.resolve().name}"
    page = write_space(made, options.out, title, options.embed)
    report = {
        "page": str(page), "bytes": page.stat().st_size, "adapters": len(space.ids),
        "strips": [strip.name for strip in made.strips], "directions": figures_of(made),
    }  # fmt: skip
    emit(report if options.json else {k: v for k, v in report.items() if k != "directions"}, options.json)
    return 0
