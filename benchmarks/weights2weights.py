"""Weights2Weights on the embedded world: what a corpus of critters' adapters knows of them.

The corpus is made by the program's own commands, at about 3 CPU seconds an adapter:

    litp world people -o people --count 2100
    litp bank plan people/people.csv --out bank -c weights2weights/tinyworld
    litp bank run bank --slots 16
    litp bank pack bank --corpus corpus
    python benchmarks/weights2weights.py corpus [--out FILE] [--only PART] [--seeds 0 1 2]

Every part, and of edits and inversion every seed, that the file has of this corpus is not done again; steps need the
corpus only to know its recipe.

steps       Fewest steps at which the reader finds the critter in 80 % of the pictures of its adapter.
attributes  Balanced accuracy of a linear classifier of weights on adapters that neither it nor the components saw, over
            the size of the corpus; three draws of each size.
edits       Parts that appear or vanish along a direction, and what stays, beside asking for it in the prompt.
inversion   One picture inverted into the space, beside DreamBooth-LoRA of the same picture.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lit_personalize import atomic
from lit_personalize.cli.console import configure_logging
from lit_personalize.corpus.store import Corpus
from lit_personalize.report import weights2weights
from lit_personalize.report.circumstances import circumstances

PARTS: dict[str, Callable[[Corpus], dict[str, Any]]] = {
    "steps": weights2weights.steps, "attributes": weights2weights.attributes,
}  # fmt: skip
SEEDED: dict[str, Callable[[Corpus, int], dict[str, Any]]] = {
    "edits": weights2weights.edits, "inversion": weights2weights.inversion,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Weights2Weights on the embedded world.")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights2weights_cpu.json")
    parser.add_argument("--only", choices=[*PARTS, *SEEDED])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of edits and inversion")
    options = parser.parse_args()
    configure_logging()
    torch.manual_seed(0)
    corpus = Corpus.open(options.corpus)
    told = {
        "corpus": corpus.fingerprint, "adapters": len(corpus), "held out": weights2weights.HELD_OUT,
        "base": corpus.base_fingerprint, "recipe": corpus.manifest["recipe"],
    }  # fmt: skip

    def recorded() -> dict[str, Any]:
        return dict(json.loads(options.out.read_text(encoding="utf-8"))) if options.out.is_file() else {}

    def current(name: str) -> dict[str, Any]:
        own, key = dict(recorded().get(name, {})), "recipe" if name == "steps" else "corpus"
        return own if own.get(key) == told[key] else {}

    def record(name: str, found: dict[str, Any]) -> None:
        line = {**told, **circumstances(Path(__file__).parent), **found}
        atomic.write_text(options.out, json.dumps({**recorded(), name: line}, indent=1) + "\n")
        print(json.dumps({name: found}, indent=1), flush=True)

    for name, part in PARTS.items():
        if options.only in (None, name) and not current(name):
            record(name, part(corpus))
    for name, seeded in SEEDED.items():
        if options.only in (None, name):
            for seed in options.seeds:
                done = current(name).get("seeds", {})
                if str(seed) not in done:
                    record(name, {"seeds": {**done, str(seed): seeded(corpus, seed)}})


if __name__ == "__main__":
    main()
