"""`litp world render|people|build|card`: pictures of the embedded world, and its base."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lit_personalize.cli.console import add_json, emit


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="litp world", description="The embedded world.")
    verbs = parser.add_subparsers(dest="what", required=True, metavar="render|people|build|card")
    render = verbs.add_parser("render", help="write pictures with captions, as a folder or as WebDataset shards")
    render.add_argument("-o", "--output", type=Path, required=True)
    render.add_argument("--count", type=int, default=100)
    render.add_argument("--seed", type=int, default=0)
    render.add_argument("--kind", choices=("object", "pair", "critter", "person", "sign"), default=None)
    render.add_argument("--population", choices=("base", "all"), default="base", help="all: with held-out attributes")
    render.add_argument("--split", choices=("train", "test"), default="train")
    render.add_argument("--subject", default=None, help="pictures of one held-out subject instead")
    render.add_argument("--shards", action="store_true", help="tar shards instead of a folder")
    render.add_argument("--size", type=int, default=64)
    people = verbs.add_parser("people", help="write a folder of pictures for each of many critters, and people.csv: "
                              "what litp bank trains a corpus of")  # fmt: skip
    people.add_argument("-o", "--output", type=Path, required=True)
    people.add_argument("--count", type=int, default=500, help="identities; a larger number goes on")
    people.add_argument("--start", type=int, default=0, help="number of the first one")
    people.add_argument("--pictures", type=int, default=10, help="of each")
    build = verbs.add_parser("build", help="train the embedded base from nothing; resumable")
    build.add_argument("-o", "--output", type=Path, default=Path("world"), help="folder; the same one continues")
    build.add_argument("--budget", default=None, help="wall-clock limit: 90s, 150m, 2.5h")
    build.add_argument("--start", type=Path, default=None, help="go on from another world's weights")
    card = verbs.add_parser("card", help="measure a built world and write its card")
    card.add_argument("world", type=Path)
    card.add_argument("--docs", type=Path, default=None, help="folder for picture and table")
    for verb in (render, people, build, card):
        add_json(verb)
    return parser


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)

    def log(message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    if options.what == "render":
        _render(options)
    elif options.what == "people":
        from lit_personalize.tinyworld.identities import write_people

        written = write_people(options.output, options.count, options.start, options.pictures)
        emit({"table": str(written), "identities": options.count, "pictures": options.pictures}, options.json)
    elif options.what == "build":
        from lit_personalize.tinyworld.build import build

        built = build(options.output, options.budget, start=options.start, log=log)
        if options.json:
            emit({"world": str(built)}, True)
        else:
            print(built)
    else:
        from lit_personalize.tinyworld.card import table, write_card

        measured = write_card(options.world, options.docs, log=log)
        if options.json:
            emit(measured, True)
        else:
            print(table(measured))
    return 0


def _render(options: argparse.Namespace) -> None:
    from lit_personalize.tinyworld import dataset

    if options.subject:
        from lit_personalize.tinyworld.concepts import subject_pictures

        pictures = subject_pictures(options.subject, options.count, options.seed)
    else:
        pictures = dataset.sample_pictures(
            options.count, options.seed, options.split, options.population, options.kind, options.size
        )
    if options.shards:
        written = list(dataset.write_shards(pictures, options.output, seed=options.seed))
    else:
        dataset.write_folder(pictures, options.output, seed=options.seed)
        written = [options.output]
    if options.json:
        emit({"pictures": len(pictures), "written": [str(path) for path in written]}, True)
    else:
        print(*written, sep="\n")
