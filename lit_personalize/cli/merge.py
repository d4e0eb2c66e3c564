"""`litp merge MODE`: combine adapters into one; every way of merging has a module of its own."""

from __future__ import annotations

import argparse
import importlib

# mode -> module of lit_personalize.cli, one line of help
MODES: dict[str, tuple[str, str]] = {
    "closed-form": ("merge_closed_form", "Custom Diffusion's constrained merge of learned concepts, without training"),
    "interpolate": ("merge_interpolate", "the adapter between two adapters: changes and token rows at a share alpha"),
    "ziplora": ("merge_ziplora", "a subject's and a style's LoRA, the weights of their columns learned (ZipLoRA)"),
}


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] in MODES:
        module = importlib.import_module(f"lit_personalize.cli.{MODES[arguments[0]][0]}")
        return int(module.main(arguments[1:]))
    parser = argparse.ArgumentParser(prog="litp merge", description="Combine adapters into one.")
    modes = parser.add_subparsers(dest="mode", required=True, metavar="|".join(MODES))
    for mode, (_, text) in MODES.items():
        modes.add_parser(mode, help=text, add_help=False)
    parser.parse_args(arguments)
    return 2
