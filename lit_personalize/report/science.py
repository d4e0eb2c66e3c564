"""The matrix of methods x subjects and styles x seeds on the embedded world, resumable, one JSON file per cell.

A cell is named by a hash of its recipe, how pictures are drawn, the base's fingerprint, what is learned and the seed: a
changed recipe or base makes new cells, finished ones are never repeated, missing ones print as missing.

    python -m lit_personalize.report.science [--budget 60m] [--jobs 2] [--cache DIR] [--out docs/science]

`report.pages` writes the tables. The first seed of every method comes first, so that a short budget
still compares all of them. A generated regularization set is drawn once per class noun and shared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_personalize.backbones.fingerprint import fingerprint_of
from lit_personalize.backbones.loading import resolve
from lit_personalize.errors import UsageError
from lit_personalize.report import combinations
from lit_personalize.report.combinations import COMBINATIONS, run_combination
from lit_personalize.report.measures import OPTIONS, measure_style, measure_subject
from lit_personalize.report.running import Cell, run_missing
from lit_personalize.report.training import Method, prepare, recipe_of, train
from lit_personalize.tinyworld.concepts import HELD_OUT_CONCEPTS, SUBJECTS_FOR_SCIENCE
from lit_personalize.tinyworld.style_concepts import STYLES_FOR_SCIENCE

SEEDS = (0, 1, 2)
ADAPTERS = "--model.init_args.adapters"
ROWS = "{class_path: TokenEmbedding, init_args: {token: <new1>, init: %s, lr: 0.02, weight_decay: 0.0}}"

METHODS: dict[str, Method] = {
    "Custom Diffusion": Method("custom_diffusion/tinyworld"),
    "DreamBooth-LoRA": Method("dreambooth_lora/tinyworld", "generated"),
    "Textual Inversion": Method("textual_inversion/tinyworld", "none"),
    "DreamBooth": Method("dreambooth/tinyworld", "generated"),
    "LoRA": Method("lora/tinyworld", "none"),
    "Pivotal Tuning": Method("pivotal_tuning/tinyworld", "none"),
    "OFT": Method("oft/tinyworld", "generated"),
    "Cones": Method("cones/tinyworld", "generated"),
    "Custom Diffusion, fine-tune all": Method(
        "custom_diffusion/tinyworld", "shards",
        (ADAPTERS, f"[{{class_path: FullWeights, init_args: {{lr: 0.0003}}}}, {ROWS % 'CLASS'}]",
         "--export.formats", "[delta]"),
    ),
    "Custom Diffusion, random V*": Method(
        "custom_diffusion/tinyworld", "shards", (ADAPTERS, f"[{{class_path: KeyValueDelta}}, {ROWS % 'RANDOM'}]")
    ),
    "Custom Diffusion, no regularization": Method(
        "custom_diffusion/tinyworld", "none", ("--model.init_args.prior_weight", "0")
    ),
    "Custom Diffusion, generated set": Method("custom_diffusion/tinyworld", "generated"),
    "Custom Diffusion, no augmentation": Method(
        "custom_diffusion/tinyworld", "shards", ("--data.init_args.augmentation", "none")
    ),
}  # fmt: skip
STYLE_METHODS: tuple[str, ...] = tuple(name for name in METHODS if "," not in name)
"""Of the methods themselves; baselines are of subjects."""


def cell_id(method: str, subject: str, seed: int, fingerprint: str) -> str:
    """Of a cell's file; `subject` is a subject, a style, or two of them of a combination."""
    if method in COMBINATIONS:
        learned, zipped = combinations.LEARNED_BY[method], combinations.ZIP
        zips = method == combinations.SUBJECT_IN_STYLE
        decisive: list[object] = [recipe_of(learned), recipe_of(zipped) if zips else None, method]
    else:
        entry = METHODS[method]
        decisive = [recipe_of(entry), entry.regularization, entry.changes]
    text = json.dumps([*decisive, str(OPTIONS), fingerprint, subject, seed])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cells() -> Iterator[Cell]:
    """All cells; one seed of everything before the next seed."""
    for seed in SEEDS:
        for subject in SUBJECTS_FOR_SCIENCE:
            for method in METHODS:
                yield method, subject, seed
        for kind, pairs in COMBINATIONS.items():
            for pair in pairs:
                yield kind, pair, seed
        for style in STYLES_FOR_SCIENCE:
            for method in STYLE_METHODS:
                yield method, style, seed


def run_cell(method: str, name: str, seed: int, weights: Path, cache: Path, steps: int | None = None) -> dict[str, Any]:
    """Train and measure a cell; sets that the base draws are kept in `cache`.

    Beside its figures a cell has "seconds" and "shown": pictures side by side, see `measures` and `combinations`.
    """
    if method in COMBINATIONS:
        figures = run_combination(method, name, seed, weights, cache, steps)
    else:
        figures = train_and_measure(name, seed, METHODS[method], weights, cache, steps)
    return {"method": method, "subject": name, "seed": seed, **figures}


def train_and_measure(
    name: str,
    seed: int,
    method: Method,
    weights: Path,
    cache: Path,
    steps: int | None = None,
    regularization: str | None = None,
) -> dict[str, Any]:
    """Train one subject or style with a method; figures, "seconds" and "shown".

    Args:
        regularization: An entry of `regularization` instead of the method's own set.
    """
    from lit_personalize.backbones.loading import load_base
    from lit_personalize.export.loading import load_adapter

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        learned = prepare(Path(folder), name, seed, method, cache)
        if regularization is not None:
            learned = replace(learned, regularization=regularization)
        run = train(Path(folder), "cell", method, [learned], seed, steps)
        base = load_base("tinyworld")
        given = (base, [load_adapter(run.exports, base)], weights, seed, learned.word)
        if name in STYLES_FOR_SCIENCE:
            figures, shown = measure_style(name, *given)
        else:
            figures, shown = measure_subject(HELD_OUT_CONCEPTS[name], *given)
    return {**figures, "seconds": round(time.monotonic() - started), "shown": shown}


def load_cells(folder: Path) -> tuple[dict[Cell, dict[str, Any]], str]:
    """The finished cells of the present recipes and base, and the base's fingerprint."""
    fingerprint = fingerprint_of(resolve("tinyworld"))
    found = {}
    for cell in cells():
        path = folder / f"{cell_id(*cell, fingerprint)}.json"
        if path.exists():
            found[cell] = json.loads(path.read_text(encoding="utf-8"))
    return found, fingerprint


def main(arguments: list[str] | None = None) -> int:
    from lit_personalize.tinyworld.build import committed_weights, seconds_of

    parser = argparse.ArgumentParser(description="Measure the methods on the embedded world.")
    parser.add_argument("--budget", default="60m", help="wall-clock limit; a started cell is finished")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once, each with its share of the cores")
    parser.add_argument("--out", type=Path, default=Path("docs/science"))
    parser.add_argument("--cache", type=Path, help="folder that keeps generated sets for the next start")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least 1")
    try:
        end = time.monotonic() + seconds_of(options.budget)
    except UsageError as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    found, fingerprint = load_cells(options.out)
    missing = {cell: options.out / f"{cell_id(*cell, fingerprint)}.json" for cell in cells() if cell not in found}
    try:
        with tempfile.TemporaryDirectory() as cache:
            given = (committed_weights(), options.cache or Path(cache))
            failed = run_missing(missing, SEEDS[0], end, options.jobs, run_cell, *given)
    except KeyboardInterrupt:
        print(f"stopped; finished cells are in {options.out}, the same command goes on", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"{error.filename}: {error.strerror}; finished cells are kept", file=sys.stderr)
        return 1
    except BrokenExecutor:
        print(f"a worker was killed, perhaps for lack of memory; finished cells are in {options.out}", file=sys.stderr)
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
