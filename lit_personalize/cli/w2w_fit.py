"""`litp w2w fit`: the space that a corpus spans."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from lit_personalize.cli.console import add_json, configure_logging, emit


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="litp w2w fit",
        description="Find mean, deviations and principal components of a corpus of adapters, reading it in blocks.",
        epilog="torchrun shares the corpus out over processes. The same command goes on where an earlier one ended.",
    )
    parser.add_argument("corpus", type=Path, help="folder of litp bank pack")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for subspace.safetensors and .json")
    parser.add_argument("--components", type=int, help="default: 1000, or as many as there are")
    parser.add_argument("--method", choices=("auto", "gram", "randomized"), default="auto",
                        help="gram is exact, and for up to 20,000 adapters")  # fmt: skip
    parser.add_argument("--power", type=int, default=2, help="power iterations of the randomised way")
    parser.add_argument("--block-rows", type=int, help="adapters in memory at once; default: half a gigabyte of them")
    parser.add_argument("--sketch", type=int, metavar="M", help="components of M numbers per layer that tell what an "
                        "adapter changes: for adapters that did not begin alike")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the random subspace, and of sketches")
    add_json(parser)
    return parser


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    configure_logging()
    import torch.distributed as dist

    from lit_personalize.corpus.store import Corpus
    from lit_personalize.weights2weights.fit import fit

    ranked = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if ranked:
        dist.init_process_group("gloo")
    try:
        space = fit(
            Corpus.open(options.corpus), options.components, options.method, options.power, options.block_rows,
            options.seed, options.sketch, options.out / ".work",
        )  # fmt: skip
        if ranked and dist.get_rank():
            return 0
        space.save(options.out)
    finally:
        if ranked:
            dist.destroy_process_group()
    emit(report(space, options.out), options.json)
    return 0


def report(space: Any, out: Path) -> dict[str, Any]:
    """What was found, with the share of the variance that the first components have."""
    shares = (space.variances.cumsum(0) / space.details["total_variance"]).tolist()
    first = {str(k): round(shares[k - 1], 4) for k in (1, 10, 100, 1000, 10_000) if k < len(space)}
    return {
        "space": str(out), "adapters": len(space.ids), "numbers": len(space.mean), "components": len(space),
        "method": space.details["method"], "explained": {**first, str(len(space)): round(shares[-1], 4)},
    }  # fmt: skip
