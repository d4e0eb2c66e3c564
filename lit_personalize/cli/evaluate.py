"""`litp evaluate`: fidelity, alignment and drift of an adapter, beside oracle and floor."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lit_personalize.cli.console import add_base, add_json, base_of, configure_logging


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="litp evaluate", description="Measure an adapter against real pictures.")
    add_base(parser)
    parser.add_argument("--adapter", type=Path, required=True, help="adapter file, folder, or run directory")
    parser.add_argument("--references", type=Path, help="folder with real pictures of the subject")
    parser.add_argument("--prompts", nargs="+", default=[], help="with the token in place")
    suites = ("tinyworld", "dreambooth", "customconcept101")
    parser.add_argument("--suite", choices=suites, help="take both from a data set, or from the embedded world")
    parser.add_argument("--suite-dir", type=Path, help="the data set's local directory, in the published layout")
    parser.add_argument("--subject", help="which subject of the suite, for example critter-03")
    parser.add_argument("--token", default="<new1>")
    parser.add_argument("--clip", type=Path, help="local CLIPModel directory; the embedded one for tinyworld")
    parser.add_argument("--dino", type=Path, default=None, help="local ViT or DINO directory")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=6.0)
    parser.add_argument("--force", action="store_true", help="accept an adapter that was made for another base")
    parser.add_argument("-o", "--output", type=Path, default=None, help="also write the report as JSON")
    add_json(parser)
    return parser


def _embedded_suite(
    name: str | None, token: str, prompts: list[str], repeats: int
) -> tuple[list[Any], list[str], Any, Any]:
    """Real pictures, prompts, the reader's figures and real renders of the prompts for one embedded subject.

    Raises:
        UsageError: There is no such subject, or prompts are given whose background the suite does not know.
    """
    from lit_personalize.errors import UsageError
    from lit_personalize.tinyworld.build import committed_weights
    from lit_personalize.tinyworld.concepts import HELD_OUT_CONCEPTS, subject_pictures
    from lit_personalize.tinyworld.reader import Reader
    from lit_personalize.tinyworld.suite import asked_pictures, figures_by_reader, prompts_of

    if name not in HELD_OUT_CONCEPTS:
        known = ", ".join(sorted(HELD_OUT_CONCEPTS))
        raise UsageError(f"the suite tinyworld has no subject {name!r}; --subject is one of: {known}")
    if prompts:
        raise UsageError("the suite tinyworld brings its own prompts; leave --prompts out, or name --references")
    subject = HELD_OUT_CONCEPTS[name]
    asked = prompts_of(subject, token)
    grounds = [ground for _, ground in asked for _ in range(repeats)]
    more = figures_by_reader(subject, grounds, Reader.load(committed_weights() / "reader"))
    real = list(subject_pictures(subject, 8, seed=999).pixels)
    return real, [prompt for prompt, _ in asked], more, asked_pictures(subject, grounds)


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    from lit_personalize.errors import UsageError

    configure_logging()
    import numpy as np
    from PIL import Image

    from lit_datamodules.image_files import list_images, read_image
    from lit_personalize.atomic import write_text
    from lit_personalize.export.loading import load_adapter
    from lit_personalize.metrics.evaluation import evaluate
    from lit_personalize.metrics.features import clip_directory
    from lit_personalize.metrics.suites import SUITES
    from lit_personalize.sampling.sampler import SamplingOptions

    clip = clip_directory(options.clip, options.base)
    prompts, more, matched = list(options.prompts), None, None
    if options.suite == "tinyworld":
        pixels, prompts, more, matched = _embedded_suite(options.subject, options.token, prompts, len(options.seeds))
    elif options.suite:
        if not options.suite_dir or not options.subject:
            raise UsageError("--suite needs --suite-dir and --subject")
        found = {s.name: s for s in SUITES[options.suite](options.suite_dir, options.token)}
        if options.subject not in found:
            raise UsageError(f"suite {options.suite} has no subject {options.subject!r}: {', '.join(sorted(found))}")
        pixels = [read_image(path).pixels for path in found[options.subject].pictures]
        prompts = prompts or list(found[options.subject].prompts)
    elif options.references:
        pixels = [read_image(path).pixels for path in list_images(options.references)]
    else:
        raise UsageError("name real pictures with --references, or a suite")
    base = base_of(options)
    folder = options.adapter / "exports" if (options.adapter / "exports").is_dir() else options.adapter
    sides = (base.resolution, base.resolution)
    pictures = [np.asarray(Image.fromarray(p).resize(sides, Image.Resampling.BICUBIC)) for p in pixels]
    adapter = load_adapter(folder, base, force=options.force)
    report = evaluate(
        base, [adapter], np.stack(pictures), prompts, clip, options.token, options.dino, options.seeds,
        SamplingOptions(options.steps, options.guidance), more, matched,
    )  # fmt: skip
    if options.output:
        write_text(options.output, report.to_json())
    if options.json:
        print(report.to_json(), end="")
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(prompts)} prompts x {len(options.seeds)} seeds", title_justify="left")
    for column in ("metric", "adapter", "real pictures", "untouched base", "n", "model"):
        table.add_column(column)
    for name, figure in report.figures.items():
        value, oracle, floor = ("" if x is None else f"{x:.4f}" for x in (figure.value, figure.oracle, figure.floor))
        table.add_row(name, value, oracle or figure.without_oracle, floor, str(figure.n), figure.model)
    Console().print(table)
    return 0
