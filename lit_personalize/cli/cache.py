"""`litp data cache`: fill the cache of latents and text states before training, in one process or several."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lit_personalize.cli.console import add_allow, add_json, allowed_by, configure_logging, emit, task_of


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="litp data cache", description="Encode the pictures and captions of a configuration once, for all runs."
    )
    parser.add_argument("-c", "--config", action="append", required=True, help="YAML file or recipe; may be repeated")
    parser.add_argument("--dir", type=Path, help="folder of the cache; default: data.init_args.cache_dir")
    parser.add_argument("--task", type=task_of, default=(0, 1), help="I/N: encode the I-th of N shares of what is new")
    add_json(parser)
    add_allow(parser)
    return parser


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    configure_logging()
    from lit_personalize.configuration import instantiate, parse
    from lit_personalize.errors import UsageError
    from lit_personalize.fitting import name_initial_words

    files = [part for given in options.config for part in ("-c", given)]
    parser, config = parse([*files, "--name", "cache", *allowed_by(options)])
    built = instantiate(parser, config)
    data: Any = built.data
    data.cache_dir = options.dir or data.cache_dir
    if data.cache_dir is None:
        raise UsageError("no folder for the cache: give --dir, or data.init_args.cache_dir in the configuration")
    name_initial_words(built)
    emit({"cache": str(data.cache_dir)} | fill(built, options.task), options.json)
    return 0


def fill(built: Any, task: tuple[int, int]) -> dict[str, Any]:
    """Draw generated sets, encode pictures, and captions where a folder is named for them; returns counts.

    Args:
        built: Objective, data module and trainer of a configuration.
        task: The share of what is new, of how many.
    """
    from lit_personalize.fitting import bind_data

    data: Any = built.data
    data.task = task
    bind_data(built)
    if task[0] == 0:
        data.prepare_data()
    data.setup("fit")
    report: dict[str, Any] = {}
    if data.cache is None:
        report["latents"] = f"not kept: {data.why_not_still or 'data.cache_latents is false'}"
    else:
        report["latents"] = {"known": data.cache.hits, "encoded": len(data.cache.encoded)}
        if data.why_not_still:
            report["latents of instances"] = f"not kept: {data.why_not_still}"
    if built.model.trains_text:
        report["text states"] = "not kept: an adapter trains the text side, and changes them at every step"
    elif data.text_store is None:
        report["text states"] = "not kept: no data.init_args.cache_dir"
    else:
        known, encoded = built.model.keep_states(data.captions[task[0] :: task[1]], data.text_store)
        report["text states"] = {"known": known, "encoded": encoded}
    return report
