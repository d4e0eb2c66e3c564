"""`litp data retrieve --generate`: a regularization set that the base draws, where no shards are at hand."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_personalize.cli.console import add_base, add_json, base_of, configure_logging, emit, task_of


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="litp data retrieve --generate", description="Let the base draw a regularization set from class prompts."
    )
    parser.add_argument("--generate", type=int, required=True, metavar="N", help="pictures per prompt")
    parser.add_argument("--query", action="append", required=True, help="class prompt: 'photo of a cat'; repeatable")
    add_base(parser)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=6.0)
    parser.add_argument("--scheduler", choices=("ddim", "dpm", "euler"), default="ddim")
    parser.add_argument("--resolution", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0, help="of the first picture of every prompt")
    parser.add_argument("--task", type=task_of, help="I/N: draw the I-th of N shares; the last one to end packs them")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the set")
    add_json(parser)
    return parser


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    configure_logging()
    from lit_datamodules.generated_sets import GeneratedSet, draw_set, samples_of
    from lit_datamodules.shard_writer import write_shards
    from lit_personalize.errors import UsageError
    from lit_personalize.sampling.sampler import SamplingOptions, generate

    if options.generate < 1:
        raise UsageError(f"--generate {options.generate}: at least 1")
    base = base_of(options)
    how = SamplingOptions(options.steps, options.guidance, scheduler=options.scheduler)

    def draw(captions: Sequence[str], seeds: Sequence[int]) -> Any:
        return generate(base, list(captions), list(seeds), None, how, options.resolution)

    identity = f"{base.fingerprint} {base.dtype} {base.vae.dtype} {how} {options.resolution or base.resolution} px"
    sets = [GeneratedSet(prompt, options.generate, options.seed, identity) for prompt in options.query]
    cache = options.output / "parts"
    folders = [draw_set(asked, cache, draw, options.task or (0, 1)) for asked in sets]
    if not all(folder.is_dir() for folder in folders):
        emit({"pictures": 0, "next": "the other tasks; the last one to end packs the set"}, options.json)
        return 0
    samples = (sample for asked, folder in zip(sets, folders, strict=True) for sample in samples_of(asked, folder))
    shards = write_shards(samples, options.output)
    pictures = sum(shard["samples"] for shard in shards.values())
    emit({"pictures": pictures, "shards": str(options.output / "00000.tar")}, options.json)
    return 0
