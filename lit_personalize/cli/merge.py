"""`litp merge MODE`: combine adapters into one; every way of merging has a module of its own."""

from __future__ import annotations

import argparse
import importlib

# mode -> module of lit_personalize.cli (or module:function where one serves several modes), one line of help
MODES: dict[str, tuple[str, str]] = {
    "closed-form": ("merge_closed_form", "Custom Diffusion's constrained merge of learned concepts, without training"),
    "interpolate": ("merge_interpolate", "the adapter between two adapters: changes and token rows at a share alpha"),
    "ziplora": ("merge_ziplora", "a subject's and a style's LoRA, the weights of their columns learned (ZipLoRA)"),
    "neurons": ("merge_neurons", "the union of several concepts' neurons (Cones)"),
    "linear": ("merge_arithmetic:linear", "the exact weighted sum, optionally at a smaller rank"),
    "concat": ("merge_arithmetic:concat", "the exact weighted sum, ranks side by side"),
    "svd": (
        "merge_arithmetic:svd",
        "the weighted sum at the largest of their ranks; truncates a single one, too",
    ),
    "ties": ("merge_arithmetic:ties", "trim, elect signs, average what agrees"),
    "dare": ("merge_arithmetic:dare", "drop elements at random, rescale, sum"),
    "magnitude": ("merge_arithmetic:magnitude", "keep the largest elements, sum"),
    "orthogonal": ("merge_arithmetic:orthogonal", "the sum, later adapters outside the inputs of earlier ones"),
    "magmax": ("merge_arithmetic:magmax", "each element of the adapter that changes it most"),
    "blora": ("merge_blora", "the content half of one SDXL adapter and the style half of another"),
    "extract": ("merge_extract", "the difference of a fine-tuned model and its base as a LoRA"),
}


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] in MODES:
        module, _, function = MODES[arguments[0]][0].partition(":")
        found = getattr(importlib.import_module(f"lit_personalize.cli.{module}"), function or "main")
        return int(found(arguments[1:]))
    parser = argparse.ArgumentParser(prog="litp merge", description="Combine adapters into one.")
    modes = parser.add_subparsers(dest="mode", required=True, metavar="|".join(MODES))
    for mode, (_, text) in MODES.items():
        modes.add_parser(mode, help=text, add_help=False)
    parser.parse_args(arguments)
    return 2
