"""`litp w2w VERB`: the space of a corpus of adapters; every verb has a module of its own."""

from __future__ import annotations

import argparse
import importlib

# verb -> module of lit_personalize.cli, one line of help
VERBS: dict[str, tuple[str, str]] = {
    "fit": ("w2w_fit", "find the space that a corpus spans"),
    "sample": ("w2w_sample", "draw new identities"),
    "edit": ("w2w_edit", "change an attribute of an adapter"),
    "invert": ("w2w_invert", "find the adapter in the space that shows a picture"),
    "merge": ("w2w_merge", "mix adapters, and add LoRAs from elsewhere"),
    "explore": ("w2w_explore", "write a page of the space: scatter, directions, nearest adapters"),
}


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] in VERBS:
        return int(importlib.import_module(f"lit_personalize.cli.{VERBS[arguments[0]][0]}").main(arguments[1:]))
    parser = argparse.ArgumentParser(prog="litp w2w", description="Compute with the weights of a corpus of adapters.")
    verbs = parser.add_subparsers(dest="what", required=True, metavar="|".join(VERBS))
    for verb, (_, text) in VERBS.items():
        verbs.add_parser(verb, help=text, add_help=False)
    parser.parse_args(arguments)
    return 2
