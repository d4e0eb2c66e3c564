"""Training one cell: pictures and captions of a subject or a style in a scratch folder, a recipe, and its run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_personalize.recipe_files import RECIPES
from lit_personalize.run_directory import RunDirectory
from lit_personalize.tinyworld import dataset
from lit_personalize.tinyworld.concepts import HELD_OUT_CONCEPTS, Subject, class_pictures, write_photos
from lit_personalize.tinyworld.style_concepts import NEIGHBOR, STYLES_FOR_SCIENCE, known_styles, write_style_photos

RARE = "sks"
"""What a concept is called where no token is trained."""
PHOTOS = 5
REGULARIZATION = 200


@dataclass(frozen=True)
class Method:
    """A recipe and what differs from it."""

    recipe: str
    regularization: str = "shards"  # shards, generated or none
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Learned:
    """A subject or style, its word, and how `fit` is told of it: entries of `concepts` and of `regularization`."""

    name: str
    word: str
    concept: str
    regularization: str

    @property
    def is_style(self) -> bool:
        return self.name in STYLES_FOR_SCIENCE


def recipe_of(method: Method) -> dict[str, Any]:
    """Its content, in which comments change nothing."""
    return dict(yaml.safe_load((RECIPES / f"{method.recipe}.yaml").read_text(encoding="utf-8")))


def adapters_of(method: Method) -> list[dict[str, Any]]:
    return list(recipe_of(method)["model"]["init_args"]["adapters"])


def steps_of(method: Method) -> int:
    return int(recipe_of(method)["trainer"]["max_steps"])


def word_of(method: Method) -> str:
    """The word that a recipe teaches: its new token, or a rare word of the vocabulary."""
    tokens = [a["init_args"]["token"] for a in adapters_of(method) if a["class_path"] == "TokenEmbedding"]
    return str(tokens[0]) if tokens else RARE


def format_of(method: Method) -> str:
    """The one that holds what was learned: the recipe's first, or a LoRA."""
    return str(recipe_of(method).get("export", {}).get("formats", ["diffusers"])[0])


def prepare(work: Path, name: str, seed: int, method: Method, cache: Path, word: str | None = None) -> Learned:
    """Write the pictures of a subject or style under `work`; sets that the base draws are kept in `cache`.

    Args:
        word: Other than the recipe's.
    """
    word = word or word_of(method)
    style, folder = name in STYLES_FOR_SCIENCE, work / f"photos-{name}"
    if style:
        write_style_photos(name, folder, PHOTOS, seed, word)
        noun = NEIGHBOR
    else:
        write_photos(HELD_OUT_CONCEPTS[name], folder, PHOTOS, seed, word)
        noun = HELD_OUT_CONCEPTS[name].class_noun
    token = f", token: {word}" if word.startswith("<") else ""
    concept = f"{{path: {folder}, class_noun: {noun}{token}}}"
    if method.regularization == "none":
        return Learned(name, word, concept, "")
    if method.regularization == "generated" and not style:
        return Learned(name, word, concept, generated_set(HELD_OUT_CONCEPTS[name], cache))
    place = work / f"set-{name}"
    place.mkdir()
    pictures = known_styles if style else lambda count, seed: class_pictures(HELD_OUT_CONCEPTS[name], count, seed)
    [shard] = dataset.write_shards(pictures(REGULARIZATION, seed + 50), place)
    return Learned(name, word, concept, f'{{shards: "{shard}"}}')


def generated_set(subject: Subject, cache: Path) -> str:
    """An entry of `regularization` that lets the base draw pictures of the class."""
    return f'{{generate: {REGULARIZATION}, prompt: "photo of a {subject.class_noun}", cache: {cache}}}'


def train(
    work: Path,
    run: str,
    method: Method,
    learned: list[Learned],
    seed: int,
    steps: int | None = None,
    changes: tuple[str, ...] = (),
) -> RunDirectory:
    """Train concepts together with a recipe; the run `run` under `work`, with its exports."""
    from lit_personalize.fitting import fit

    concepts = ", ".join(one.concept for one in learned)
    sets = ", ".join(one.regularization for one in learned if one.regularization)
    arguments = ["-c", method.recipe, "--name", run, "--root", str(work),
                 "--data.init_args.concepts", f"[{concepts}]", "--data.init_args.regularization", f"[{sets}]",
                 "--model.init_args.seed", str(seed), "--data.init_args.seed", str(seed),
                 "--export.formats", f"[{format_of(method)}]", "--export.verify", "false",
                 "--sampling.every", "1000000", *method.changes, *changes]  # fmt: skip
    if steps is not None:
        arguments += ["--trainer.max_steps", str(steps)]
    return fit(arguments)
