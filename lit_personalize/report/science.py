"""The matrix of methods x subjects x seeds on the embedded world, resumable, one JSON file per cell.

A cell is named by a hash of its recipe, how pictures are drawn, the base's fingerprint, the subject
and the seed: a changed recipe or base makes new cells, finished ones are never repeated, missing ones print as missing.

    python -m lit_personalize.report.science [--budget 60m] [--jobs 2] [--cache DIR] [--out docs/science]

`report.pages` writes the tables. The first seed of every method comes first, so that a short budget
still compares all of them. A generated regularization set is drawn once per class noun and shared.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from lit_personalize.atomic import replacing, write_text
from lit_personalize.backbones.fingerprint import fingerprint_of
from lit_personalize.backbones.loading import resolve
from lit_personalize.errors import UsageError
from lit_personalize.sampling.sampler import SamplingOptions
from lit_personalize.tinyworld.concepts import (
    HELD_OUT_CONCEPTS,
    SUBJECTS_FOR_SCIENCE,
    Subject,
    class_pictures,
    subject_pictures,
    write_photos,
)

SEEDS = (0, 1, 2)
TOKEN = "<new1>"
OPTIONS = SamplingOptions(steps=15, guidance=2.0, scheduler="dpm", batch_size=16)


@dataclass(frozen=True)
class Method:
    """A recipe and what differs from it."""

    recipe: str
    regularization: str = "shards"  # shards, generated or none
    changes: tuple[str, ...] = ()


METHODS: dict[str, Method] = {
    "Custom Diffusion": Method("custom_diffusion/tinyworld"),
    "DreamBooth-LoRA": Method("dreambooth_lora/tinyworld", "generated"),
    "Textual Inversion": Method("textual_inversion/tinyworld", "none"),
    "Custom Diffusion, no regularization": Method(
        "custom_diffusion/tinyworld", "none", ("--model.init_args.prior_weight", "0")
    ),
    "Custom Diffusion, generated set": Method("custom_diffusion/tinyworld", "generated"),
    "Custom Diffusion, no augmentation": Method(
        "custom_diffusion/tinyworld", "shards", ("--data.init_args.augmentation", "none")
    ),
}


def cell_id(method: str, subject: str, seed: int, fingerprint: str) -> str:
    from lit_personalize.recipe_files import RECIPES

    entry = METHODS[method]
    recipe = yaml.safe_load((RECIPES / f"{entry.recipe}.yaml").read_text(encoding="utf-8"))  # comments change nothing
    text = json.dumps([recipe, entry.regularization, entry.changes, str(OPTIONS), fingerprint, subject, seed])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cells() -> Iterator[tuple[str, str, int]]:
    """All cells; one seed of every method and subject before the next seed."""
    for seed in SEEDS:
        for subject in SUBJECTS_FOR_SCIENCE:
            for method in METHODS:
                yield method, subject, seed


def run_cell(method: str, name: str, seed: int, weights: Path, cache: Path, steps: int | None = None) -> dict[str, Any]:
    """Train one subject with one method and measure it; generated sets are kept in `cache`.

    Beside its figures a cell has "shown": see `measure`.
    """
    from lit_personalize.tinyworld import dataset

    subject, entry = HELD_OUT_CONCEPTS[name], METHODS[method]
    with tempfile.TemporaryDirectory() as folder:
        regularization = "[]"
        if entry.regularization == "shards":
            [shard] = dataset.write_shards(class_pictures(subject, 200, seed + 50), Path(folder))
            regularization = f'[{{shards: "{shard}"}}]'
        elif entry.regularization == "generated":
            regularization = generated_set(subject, cache)
        figures = train_and_measure(name, seed, entry.recipe, regularization, weights, entry.changes, steps)
    return {"method": method, "subject": name, "seed": seed, **figures}


def generated_set(subject: Subject, cache: Path) -> str:
    """The value of `regularization` that lets the base draw 200 pictures of the class."""
    return f'[{{generate: 200, prompt: "photo of a {subject.class_noun}", cache: {cache}}}]'


def train_and_measure(
    name: str,
    seed: int,
    recipe: str,
    regularization: str,
    weights: Path,
    changes: tuple[str, ...] = (),
    steps: int | None = None,
) -> dict[str, Any]:
    """Train one subject with a recipe and a regularization set, `[]` for none; figures, "seconds" and "shown"."""
    from lit_personalize.fitting import fit

    subject = HELD_OUT_CONCEPTS[name]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        dreambooth = "dreambooth" in recipe
        write_photos(subject, work / "photos", 5, seed, "sks" if dreambooth else TOKEN)
        token = "" if dreambooth else f", token: {TOKEN}"
        concept = f"{{path: {work / 'photos'}, class_noun: {subject.class_noun}{token}}}"
        arguments = ["-c", recipe, "--name", "cell", "--root", folder,
                     "--data.init_args.concepts", f"[{concept}]",
                     "--data.init_args.regularization", regularization,
                     "--model.init_args.seed", str(seed), "--data.init_args.seed", str(seed),
                     "--export.formats", "[diffusers]", "--export.verify", "false",
                     "--sampling.every", "1000000", *changes]  # fmt: skip
        if steps is not None:
            arguments += ["--trainer.max_steps", str(steps)]
        run = fit(arguments)
        figures, shown = measure(subject, run.path, weights, seed, "sks" if dreambooth else TOKEN)
    return {**figures, "seconds": round(time.monotonic() - started), "shown": shown}


@functools.lru_cache(maxsize=32)
def _untouched(prompts: tuple[str, ...], seeds: tuple[int, ...]) -> np.ndarray:
    """Pictures of the base alone, which many cells compare with."""
    from lit_personalize.backbones.loading import load_base
    from lit_personalize.sampling.sampler import generate

    return generate(load_base("tinyworld"), prompts, seeds, None, OPTIONS)


def measure(subject: Subject, run: Path, weights: Path, seed: int, word: str) -> tuple[dict[str, float], np.ndarray]:
    """What the pictures of unseen prompts show, and how far class pictures moved.

    Also the first prompt's picture with the adapter, the real one and the untouched base's, side by side:
    uint8 `[64, 3 * 64, 3]`.
    """
    from lit_personalize.backbones.loading import load_base
    from lit_personalize.export.loading import load_adapter
    from lit_personalize.metrics import alignment
    from lit_personalize.metrics.features import Clip
    from lit_personalize.metrics.kernel_distance import mmd2
    from lit_personalize.sampling.sampler import generate
    from lit_personalize.tinyworld.reader import Reader
    from lit_personalize.tinyworld.suite import asked_pictures, prompts_of, shares

    base = load_base("tinyworld")
    adapter = load_adapter(run / "exports", base)
    asked = prompts_of(subject, word)
    prompts = [prompt for prompt, _ in asked] * 2
    grounds = [ground for _, ground in asked] * 2
    plain = [alignment.without_token(p, word) for p in prompts]
    drawn = generate(base, prompts, [1000 * seed + i for i in range(len(prompts))], [adapter], OPTIONS)
    reader, clip = Reader.load(weights / "reader"), Clip(weights / "clip")
    own = clip.images(drawn)
    noun = f"a photo of a {subject.class_noun}"
    class_with = clip.images(generate(base, [noun] * 32, list(range(32)), [adapter], OPTIONS))
    class_real = clip.images(class_pictures(subject, 200, seed=900).pixels)
    class_base = clip.images(_untouched((noun,) * 32, tuple(range(100, 132))))
    floor = _untouched(tuple(plain), tuple(1000 * seed + i for i in range(len(plain))))
    training = clip.images(subject_pictures(subject, 5, seed).pixels)
    texts = clip.texts(plain)
    real = asked_pictures(subject, grounds)
    figures = {
        "CLIP-T normalised": alignment.normalised_text_alignment(own, texts),
        "KID x 1000, class prompt": 1000 * mmd2(class_with, class_base, "kid"),
        "KID x 1000, class prompt to real": 1000 * mmd2(class_with, class_real, "kid"),
    }
    for suffix, pixels in (("", drawn), (", real", real), (", base", floor)):
        features = clip.images(pixels)
        values = shares(pixels, subject, grounds, reader)
        values["CLIP-T"] = alignment.text_alignment(features, texts)
        values["CLIP-I"] = alignment.image_alignment(features, training)
        values["nearest training picture"] = alignment.nearest_similarity(features, training)
        figures.update({f"{name}{suffix}": value for name, value in values.items()})
    return figures, np.concatenate([drawn[0], real[0], floor[0]], axis=1)


def load_cells(folder: Path) -> tuple[dict[tuple[str, str, int], dict[str, Any]], str]:
    """The finished cells of the present recipes and base, and the base's fingerprint."""
    fingerprint = fingerprint_of(resolve("tinyworld"))
    found = {}
    for method, subject, seed in cells():
        path = folder / f"{cell_id(method, subject, seed, fingerprint)}.json"
        if path.exists():
            found[method, subject, seed] = json.loads(path.read_text(encoding="utf-8"))
    return found, fingerprint


def main(arguments: list[str] | None = None) -> int:
    from lit_personalize.tinyworld.build import seconds_of

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
    try:
        with tempfile.TemporaryDirectory() as cache:
            failed = run_missing(options.out, options.cache or Path(cache), end, options.jobs)
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


def run_missing(
    out: Path, cache: Path, end: float, jobs: int, run: Callable[..., dict[str, Any]] = run_cell
) -> int:
    """Measure the cells that `out` lacks, started before the time `end`; the number of those that failed."""
    from lit_personalize.tinyworld.build import committed_weights

    found, fingerprint = load_cells(out)
    missing = [cell for cell in cells() if cell not in found]
    failed = 0
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=_begin_worker, initargs=(threads,)
    ) as pool:
        running: dict[Future[dict[str, Any]], tuple[str, str, int]] = {}
        while running or (missing and time.monotonic() < end):
            while missing and len(running) < jobs and time.monotonic() < end:
                cell = missing.pop(0)
                running[pool.submit(run, *cell, committed_weights(), cache)] = cell
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(done)
                named = "{}, {}, seed {}".format(*cell)
                error = done.exception()
                if isinstance(error, BrokenExecutor):
                    raise error
                if error is not None:  # the others go on
                    failed += 1
                    print(f"{named}: failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    continue
                result = done.result()
                place = out / cell_id(*cell, fingerprint)
                shown = result.pop("shown")
                if cell[2] == SEEDS[0]:  # one seed is enough to look at
                    with replacing(place.with_suffix(".png")) as temporary:
                        Image.fromarray(shown).save(temporary)
                write_text(place.with_suffix(".json"), json.dumps(result, indent=2) + "\n")
                print(f"{named}: {result['seconds']} s", file=sys.stderr, flush=True)
    return failed


def _begin_worker(threads: int) -> None:
    import torch

    from lit_personalize.cli.console import configure_logging

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a traceback; the parent says the rest
    configure_logging()
    torch.set_num_threads(threads)


if __name__ == "__main__":
    sys.exit(main())
