"""`litp init`: a commented run.yaml for a folder of pictures. Asks nothing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lit_personalize.cli.console import add_json, emit

METHODS = {
    "custom_diffusion": ("PriorPreservation", True, "photo of a {token} {class}"),
    "custom_diffusion_faces": ("PriorPreservation", True, "photo of a {token} {class}"),
    "textual_inversion": ("Denoising", False, "object"),
    "dreambooth_lora": ("PriorPreservation", True, "photo of a {token} {class}"),
    "pivotal_tuning": ("Denoising", False, "photo of a {token} {class}"),
    "dreambooth": ("PriorPreservation", True, "photo of a {token} {class}"),
    "oft": ("PriorPreservation", True, "photo of a {token} {class}"),
    "cones": ("PriorPreservation", True, "photo of a {token} {class}"),
    "lora": ("Denoising", False, "photo of a {class}"),
    "b_lora": ("Denoising", False, "A {token}"),
}
STYLE = "painting in the style of {token} {class}"
"""Custom Diffusion's only sentence about a style, whose class noun is "art"."""
STYLE_PROMPTS = {"object": "style", "photo of a {token} {class}": STYLE}
"""What a picture's prompt becomes where the concept is a style."""
CLASS_PICTURES = "# Pictures of the class with captions, so that the class stays what it is."
# These train no token row: their word is one that the tokenizer knows, and that few captions hold.
WORDS = {method: "sks" for method in ("dreambooth_lora", "dreambooth", "oft", "cones", "b_lora")}
# Pivotal Tuning trains two rows in every encoder, each of a name of its own.
WORDS["pivotal_tuning"] = "<s0><s1>"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="litp init", description="Write a run.yaml for a folder of pictures.")
    parser.add_argument("--images", type=Path, required=True, help="folder with the pictures of one concept")
    parser.add_argument("--class-noun", required=True, help="what it is, in one word: cat")
    parser.add_argument("--method", choices=METHODS, default="custom_diffusion")
    parser.add_argument("--style", action="store_true", help="the concept is a style of pictures; class noun: art")
    parser.add_argument("--base", default="tinyworld", help='diffusers directory, single file, or "tinyworld"')
    parser.add_argument("--token", default="", help="word for the concept; default: the recipe's, such as <new1>")
    parser.add_argument("--regularization", default="", help="shards, a folder, or a number of pictures to generate")
    parser.add_argument("--name", default="", help="name of the run; default: the folder's name")
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps; default: the recipe's")
    parser.add_argument("-o", "--output", type=Path, default=Path("run.yaml"))
    add_json(parser)
    return parser


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    from lit_personalize.errors import DataError, UsageError

    if options.style and METHODS[options.method][2] not in STYLE_PROMPTS:
        able = ", ".join(method for method, (_, _, prompt) in METHODS.items() if prompt in STYLE_PROMPTS)
        raise UsageError(f"{options.method} has no prompts about styles; --style goes with {able}")
    if not options.images.is_dir():
        raise DataError(f"folder {options.images} does not exist; --images names a folder of pictures")
    if options.output.exists():
        raise UsageError(f"{options.output} exists; choose another file with -o, or remove it")
    from lit_datamodules.image_files import list_images

    list_images(options.images)  # so that an empty folder is said now and not by the training
    options.output.write_text(
        run_yaml(
            options.method, options.base, options.images, options.class_noun,
            options.token or WORDS.get(options.method, "<new1>"),
            options.regularization, options.name or options.images.resolve().name, options.steps,
            options.style,
        ),
        encoding="utf-8",
    )  # fmt: skip
    if options.json:
        emit({"config": str(options.output)}, True)
    else:
        print(options.output)
    print(f"next: litp fit -c {options.output}", file=sys.stderr)
    return 0


def run_yaml(
    method: str, base: str, images: Path, class_noun: str, token: str, regularization: str, name: str, steps: int = 0,
    style: bool = False,
) -> str:  # fmt: skip
    """The text of a configuration that `litp fit` accepts; with `style` its prompts speak of a manner of painting."""
    from lit_personalize.recipe_files import base_key, recipe_text

    needs_token = method != "lora"
    subject = f"{token} {class_noun}" if needs_token else class_noun
    lines = [
        f"# {method.replace('_', ' ')} on {base}. Run it with: litp fit -c FILE (the same command continues).",
        f"name: {name}",
        f"recipe: {method}",
        *recipe_text(method, base_key(base), base, token).splitlines(),
    ]
    text = "\n".join(lines)
    prompt = STYLE_PROMPTS[METHODS[method][2]] if style else METHODS[method][2]
    concept = [f"path: {images}", f"class_noun: {class_noun}", f'prompt: "{prompt}"']
    if needs_token:
        concept.insert(2, f"token: {token}")
    said = "# Describe a picture in a .txt file beside it; prompt stands for those without one."
    block = f"      {said}\n      - {{{', '.join(concept)}}}"
    text = text.replace("    concepts: []", f"    concepts:\n{block}")
    if METHODS[method][1]:
        untold = (STYLE if style else "photo of a {token} {class}").replace("{token} ", "")
        chosen = _regularization(regularization, untold.replace("{class}", class_noun))
        block = f"    regularization:\n      {CLASS_PICTURES}\n      - {chosen}\n"
        text = text.replace("    resolution:", f"{block}    resolution:", 1)
    photo = f"photo of a {subject}"
    prompts = [photo, f"{photo} on the beach", f"{photo} on a blue background"]
    if style:
        things = ("painting", "painting of a dog", "painting of a house")
        prompts = [f"{thing} in the style of {subject}" for thing in things]
    text = text.replace("sampling: {", f"sampling: {{prompts: [{', '.join(prompts)}], ")
    if steps:
        import re

        text = re.sub(r"max_steps: \d+", f"max_steps: {steps}", text)
    return text + "\n"


def _regularization(given: str, prompt: str) -> str:
    if not given or given.isdigit():
        return f'{{generate: {given or 200}, prompt: "{prompt}"}}'
    if given.endswith(".tar"):
        return f'{{shards: "{given}"}}'
    return f'{{folder: {given}, prompt: "{prompt}"}}'
