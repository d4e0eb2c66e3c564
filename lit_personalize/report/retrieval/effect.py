"""Custom Diffusion beside a retrieved, a random and a generated regularization set, resumable, one JSON file per cell.

    python -m lit_personalize.report.retrieval.effect WORK [--budget 60m] [--clip DIR]

WORK is the folder of `quality`, with its corpus. Only the set differs between the cells of a subject and a seed:

* retrieved: what `litp data retrieve` finds for the class prompt, near-duplicates left out, as it is by default;
* random: as many pairs of the corpus, others for each seed;
* generated: as many pictures that the base draws of the class prompt.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from lit_personalize.atomic import write_text
from lit_personalize.backbones.fingerprint import fingerprint_of, weights_identity
from lit_personalize.backbones.loading import resolve
from lit_personalize.errors import DataError, UsageError
from lit_personalize.metrics.features import Clip
from lit_personalize.report.measures import OPTIONS
from lit_personalize.report.retrieval.quality import OUT, N
from lit_personalize.report.science import SEEDS, train_and_measure
from lit_personalize.report.training import Method, generated_set
from lit_personalize.tinyworld.build import committed_weights, seconds_of
from lit_personalize.tinyworld.concepts import HELD_OUT_CONCEPTS, Subject
from lit_personalize.tinyworld.dataset import read_tar, write_tar

RECIPE = "custom_diffusion/tinyworld"
SETS = ("retrieved", "random", "generated")
SUBJECTS = ("critter-03", "olive-zigzag-heart")
Cells = dict[tuple[str, str, int], dict[str, Any]]
CELLS = "effect"
"""Folder of the cells beside the other results."""


def cells() -> Iterator[tuple[str, str, int]]:
    """Set, subject and seed; all of a seed before the next, so that pairs are whole when time ends."""
    for seed in SEEDS:
        for subject in SUBJECTS:
            for name in SETS:
                yield name, subject, seed


def recipe_id() -> str:
    """Sixteen hex digits of the recipe, of how pictures are drawn, and of the base."""
    from lit_personalize.recipe_files import RECIPES

    recipe = yaml.safe_load((RECIPES / f"{RECIPE}.yaml").read_text(encoding="utf-8"))  # comments change nothing
    text = json.dumps([recipe, str(OPTIONS), fingerprint_of(resolve("tinyworld"))])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def caption_tower(clip: Path) -> str:
    """Identity of what a CLIP embeds captions with; its picture tower has no part in a set that a sentence asks for."""
    model = Clip(clip).model
    return weights_identity(torch.nn.ModuleList([model.text_model, model.text_projection]))


def retrieved_set(subject: Subject, work: Path, clip: Path, n: int) -> tuple[str, int]:
    """The packed set of a subject's class, retrieved unless it is there, and how many pictures it has.

    Raises:
        DataError: The command failed.
    """
    from lit_personalize.cli.main import main as litp

    out = work / f"set-{subject.class_noun}"
    if not (out / "retrieval.json").exists():
        corpus = work / "corpus" / "[0-9]*.tar"
        code = litp(["data", "retrieve", "--query", f"photo of a {subject.class_noun}", "--n", str(n),
                     "--shards", str(corpus), "--clip", str(clip), "-o", str(out)])  # fmt: skip
        if code:
            raise DataError(f"litp data retrieve ended with {code}")
    count = json.loads((out / "retrieval.json").read_text(encoding="utf-8"))["pictures"]
    return f'{{shards: "{out / "00000.tar"}"}}', count


def random_set(work: Path, seed: int, n: int) -> str:
    """A shard of `n` pairs of the corpus.

    Raises:
        DataError: The corpus has fewer.
    """
    shards = sorted((work / "corpus").glob("[0-9]*.tar"))
    keys = [(shard, key) for shard in shards for key, _ in read_tar(shard)]
    if len(keys) < n:
        raise DataError(f"{work / 'corpus'} has {len(keys)} pairs, {n} are needed: run quality first")
    picks = {keys[i] for i in np.random.default_rng([seed, 8]).choice(len(keys), n, replace=False)}
    path = work / f"random-{seed}" / "00000.tar"
    chosen = (members for shard in shards if any(shard == s for s, _ in picks)
              for key, members in read_tar(shard) if (shard, key) in picks)  # fmt: skip
    write_tar(chosen, path)
    return f'{{shards: "{path}"}}'


def run_cell(
    name: str, subject: str, seed: int, work: Path, clip: Path, n: int = N, steps: int | None = None
) -> dict[str, Any]:
    """Train one subject beside one set; its figures, and what decides them."""
    given, count = HELD_OUT_CONCEPTS[subject], n
    if name == "retrieved":
        regularization, count = retrieved_set(given, work, clip, n)
    elif name == "random":
        regularization = random_set(work, seed, n)
    else:
        regularization = generated_set(given, work / "generated")
    method, weights = Method(RECIPE), committed_weights()
    found = train_and_measure(subject, seed, method, weights, work / "generated", steps, regularization)
    del found["shown"]
    about = {"set": name, "subject": subject, "seed": seed, "pictures": count, "recipe": recipe_id()}
    return {**about, "encoder": caption_tower(clip), **found}


def load_cells(out: Path) -> Cells:
    """The finished cells of the present recipe and base."""
    found = {}
    for cell in cells():
        path = cell_path(out, *cell)
        if path.exists() and (row := json.loads(path.read_text(encoding="utf-8")))["recipe"] == recipe_id():
            found[cell] = row
    return found


def cell_path(out: Path, name: str, subject: str, seed: int) -> Path:
    return out / CELLS / f"{subject}-{name}-{seed}.json"


def main(arguments: list[str] | None = None) -> int:
    from lit_personalize.cli.console import configure_logging

    parser = argparse.ArgumentParser(description="Measure what the regularization set does to Custom Diffusion.")
    parser.add_argument("work", type=Path, help="folder that quality has filled")
    parser.add_argument("--budget", default="60m", help="wall-clock limit; a started cell is finished")
    parser.add_argument("--clip", type=Path, default=committed_weights() / "retrieval_clip")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    try:
        end = time.monotonic() + seconds_of(options.budget)
    except UsageError as error:
        parser.error(str(error))
    configure_logging()
    done, encoder = load_cells(options.out), caption_tower(options.clip)
    for cell in cells():
        if cell in done and done[cell]["encoder"] == encoder:
            continue
        if time.monotonic() > end:
            break
        row = run_cell(*cell, options.work, options.clip)
        write_text(cell_path(options.out, *cell), json.dumps(row, indent=1) + "\n")
        print(f"{cell[1]}, {cell[0]}, seed {cell[2]}: {row['seconds']} s", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
