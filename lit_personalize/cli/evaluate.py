"""`litp evaluate`: fidelity, alignment and drift of an adapter, beside oracle and floor."""

from __future__ import annotations

import argparse
from pathlib import Path


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="litp evaluate", description="Measure an adapter against real pictures.")
    parser.add_argument("--base", default="tinyworld", help='diffusers directory, single file, or "tinyworld"')
    parser.add_argument("--adapter", type=Path, required=True, help="adapter file, folder, or run directory")
    parser.add_argument("--references", type=Path, help="folder with real pictures of the subject")
    parser.add_argument("--prompts", nargs="+", default=[], help="with the token in place")
    parser.add_argument("--suite", choices=("dreambooth", "customconcept101"), help="take both from a data set")
    parser.add_argument("--suite-dir", type=Path, help="its local directory, in the published layout")
    parser.add_argument("--subject", help="which subject of the suite")
    parser.add_argument("--token", default="<new1>")
    parser.add_argument("--clip", type=Path, help="local CLIPModel directory; the embedded one for tinyworld")
    parser.add_argument("--dino", type=Path, default=None, help="local ViT or DINO directory")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=6.0)
    parser.add_argument("-o", "--output", type=Path, default=None, help="also write the report as JSON")
    parser.add_argument("--json", action="store_true")
    return parser


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    from lit_personalize.cli.console import configure_logging
    from lit_personalize.errors import UsageError

    configure_logging()
    import numpy as np
    from PIL import Image

    from lit_datamodules.image_files import list_images, read_image
    from lit_personalize.atomic import write_text
    from lit_personalize.backbones.loading import load_base
    from lit_personalize.export.loading import load_adapter
    from lit_personalize.metrics.evaluation import evaluate
    from lit_personalize.metrics.features import clip_directory
    from lit_personalize.metrics.suites import SUITES
    from lit_personalize.sampling.sampler import SamplingOptions

    clip = clip_directory(options.clip, options.base)
    prompts = list(options.prompts)
    if options.suite:
        if not options.suite_dir or not options.subject:
            raise UsageError("--suite needs --suite-dir and --subject")
        found = {s.name: s for s in SUITES[options.suite](options.suite_dir, options.token)}
        if options.subject not in found:
            raise UsageError(f"suite {options.suite} has no subject {options.subject!r}: {', '.join(sorted(found))}")
        paths, prompts = list(found[options.subject].pictures), prompts or list(found[options.subject].prompts)
    elif options.references:
        paths = list_images(options.references)
    else:
        raise UsageError("name real pictures with --references, or a suite")
    base = load_base(options.base)
    folder = options.adapter / "exports" if (options.adapter / "exports").is_dir() else options.adapter
    side = base.resolution
    pictures = [Image.fromarray(read_image(p).pixels).resize((side, side), Image.Resampling.BICUBIC) for p in paths]
    report = evaluate(
        base, [load_adapter(folder, base)], np.stack([np.asarray(p) for p in pictures]), prompts, clip, options.token,
        options.dino, options.seeds, SamplingOptions(options.steps, options.guidance),
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
        numbers = ["" if x is None else f"{x:.4f}" for x in (figure.value, figure.oracle, figure.floor)]
        table.add_row(name, *numbers, str(figure.n), figure.model)
    Console().print(table)
    return 0
