"""`litp merge ziplora`: a subject's and a style's LoRA into one, by training their columns' weights (ZipLoRA)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lit_personalize.cli.console import add_json

METHOD = "ziplora"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="litp merge ziplora", allow_abbrev=False,
        description="Weigh the columns of two LoRAs so that the sum draws the subject as the first does and the style "
        "as the second does. Writes a configuration and trains it; the same command continues.",
        epilog="Other options go to litp fit: --trainer.max_steps 200 --model.init_args.optimizer.init_args.lr 0.02",
    )  # fmt: skip
    parser.add_argument("--base", required=True, help='diffusers directory, single file, or "tinyworld"')
    for part, what in (("content", "subject"), ("style", "style")):
        parser.add_argument(f"--{part}", type=Path, required=True, help=f"LoRA or run of the {what}")
        parser.add_argument(f"--{part}-images", type=Path, required=True, help="pictures that it was trained on")
        parser.add_argument(f"--{part}-prompt", required=True, help="caption that it was trained with")
    parser.add_argument("--prompts", nargs="+", default=[], help="of the grid: 'photo of a sks cat in ink style'")
    parser.add_argument("--name", default="zipped", help="name of the run")
    parser.add_argument("--root", default="runs", help="folder of runs")
    add_json(parser)
    return parser


def main(arguments: list[str]) -> int:
    options, others = build_parser().parse_known_args(arguments)
    from lit_personalize import atomic
    from lit_personalize.cli import fit
    from lit_personalize.errors import DataError, UsageError

    for folder in (options.content_images, options.style_images):
        if not folder.is_dir():
            raise DataError(f"folder {folder} does not exist; it holds the pictures that the LoRA was trained on")
    text, config = configuration_of(options), Path(f"{options.name}.yaml")
    if not config.exists():
        atomic.write_text(config, text)
        print(f"configuration: {config}", file=sys.stderr)
    elif config.read_text(encoding="utf-8") != text:
        other = f"run litp fit -c {config}, or take another --name"
        raise UsageError(f"{config} is of another merge or was changed: {other}")
    given = ["-c", str(config), "--recipe", METHOD, "--root", options.root, *others]
    return fit.main([*given, *(["--json"] if options.json else [])])


def configuration_of(options: argparse.Namespace) -> str:
    """The text of a configuration that `litp fit` accepts."""
    import yaml

    from lit_personalize.recipe_files import base_key, recipe_text

    text = recipe_text(METHOD, base_key(options.base), options.base, "")
    concepts = []
    for part in ("content", "style"):
        place = getattr(options, part)
        exports = place / "exports"
        text = text.replace(f"{part}: {part.upper()}", f'{part}: "{exports if exports.is_dir() else place}"')
        folder, prompt = getattr(options, f"{part}_images"), getattr(options, f"{part}_prompt")
        concepts.append({"path": str(folder), "prompt": prompt, "captions": "prompt", "name": part})
    lines = "".join(f"      - {yaml.safe_dump(concept, default_flow_style=True, width=1000)}" for concept in concepts)
    text = text.replace("    concepts: []\n", f"    concepts:\n{lines}")
    prompts = options.prompts or [options.content_prompt, options.style_prompt]
    listed = yaml.safe_dump(prompts, default_flow_style=True, width=1000).strip()
    text = text.replace("sampling: {", f"sampling: {{prompts: {listed}, ")
    return f"# Run it with: litp fit -c FILE (the same command continues).\nname: {options.name}\n{text}\n"
