"""`litp quickstart`: the whole way on the embedded base, from five pictures to verified files.

A critter of its own shape and parts, which the base has never seen, is learned with DreamBooth-LoRA
from five pictures, beside a regularization set. Everything stays in one folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from lit_personalize.cli.console import add_json, configure_logging, emit, run_report, where_things_are
from lit_personalize.cli.init import WORDS, run_yaml

METHOD = "dreambooth_lora"
WORD = WORDS[METHOD]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="litp quickstart", description="Learn a subject of the embedded world.")
    parser.add_argument("-o", "--output", type=Path, default=Path("quickstart"), help="folder for everything")
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps; default: the recipe's")
    add_json(parser)
    return parser


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    started = time.monotonic()
    configure_logging()
    folder: Path = options.output
    config = prepare(folder, options.steps)
    from lit_personalize.fitting import fit

    run = fit(["-c", str(config), "--root", str(folder / "runs")])
    figures = measure(folder, run.path)
    seconds, pictures = time.monotonic() - started, str(folder / "compare.png")
    if options.json:
        emit({**run_report(run.path), "figures": figures, "seconds": seconds, "pictures": pictures}, True)
        return 0
    where_things_are(run.path, sys.stdout)
    from rich.console import Console
    from rich.table import Table

    table = Table(title="what the pictures show, read by the reader", title_justify="left")
    for column in ("backgrounds never trained", "subject's attributes", "all of them", "asked background"):
        table.add_column(column)
    for name, row in figures.items():
        table.add_row(name, *(f"{value:.0%}" for value in row.values()))
    console = Console(file=sys.stdout)
    console.print(table)
    console.print(f"{seconds:.0f} seconds in all; pictures: {pictures}")
    return 0


def prepare(folder: Path, steps: int = 0) -> Path:
    """Render the subject and the regularization set, and write run.yaml; keeps what is there."""
    from lit_personalize.tinyworld import dataset
    from lit_personalize.tinyworld.concepts import QUICKSTART_SUBJECT, write_photos

    photos, shards, config = folder / "photos", folder / "regularization", folder / "run.yaml"
    if not photos.is_dir():
        write_photos(QUICKSTART_SUBJECT, photos, 5, 0, WORD)
    if not shards.is_dir():
        dataset.write_shards(dataset.sample_pictures(200, seed=5, kind="critter"), shards)
    if not config.exists():
        text = run_yaml(METHOD, "tinyworld", photos, QUICKSTART_SUBJECT.class_noun, WORD,
                        str(shards / "00000.tar"), "subject", steps)  # fmt: skip
        config.write_text(text, encoding="utf-8")
    elif steps:
        print(f"litp quickstart: --steps {steps} is not used, since {config} exists: change it there, or name "
              "another folder with -o", file=sys.stderr)  # fmt: skip
    return config


def measure(folder: Path, run: Path) -> dict[str, dict[str, float]]:
    """Share of pictures that show the subject and the asked background: base, adapter, and real renders."""
    import numpy as np

    from lit_personalize.backbones.loading import load_base
    from lit_personalize.export.loading import load_adapter
    from lit_personalize.sampling.grid import captioned_grid
    from lit_personalize.sampling.sampler import SamplingOptions, generate
    from lit_personalize.tinyworld.build import committed_weights
    from lit_personalize.tinyworld.concepts import QUICKSTART_SUBJECT, subject_pictures
    from lit_personalize.tinyworld.reader import Reader
    from lit_personalize.tinyworld.suite import shares

    subject, noun = QUICKSTART_SUBJECT, QUICKSTART_SUBJECT.class_noun
    shown = {scene.background for scene in subject_pictures(QUICKSTART_SUBJECT, 5, seed=0).scenes}
    grounds = tuple(g for g in subject.backgrounds() if g not in shown)
    prompts = [f"a {WORD} {noun} on a {ground} background" for ground in grounds]
    seeds = list(range(100, 100 + len(prompts)))
    options = SamplingOptions(steps=25, guidance=2.0)
    base = load_base("tinyworld")
    untouched = generate(base, [p.replace(f"{WORD} ", "") for p in prompts], seeds, None, options)
    adapted = generate(base, prompts, seeds, [load_adapter(run / "exports", base)], options)
    real = subject_pictures(subject, len(grounds), seed=9, backgrounds=grounds).pixels
    rows = {"untouched base": untouched, "with the adapter": adapted, "real pictures": real}
    captioned_grid(np.concatenate(list(rows.values())), prompts * 3, len(prompts)).save(folder / "compare.png")
    reader = Reader.load(committed_weights() / "reader")
    return {name: shares(pixels, subject, grounds, reader) for name, pixels in rows.items()}
