"""Cells of combined concepts: two subjects in one scene, and a subject in a learned style, in every way of combining.

Concepts are learned once per cell and combined in every way, so that ways differ in nothing else. A cell's figures are
named "way: figure"; "real" and "base" are ways, too: what the renderer and the untouched base draw.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lit_personalize.adapters.klora import KLoRA
from lit_personalize.adapters.loaded import LoadedAdapter
from lit_personalize.adapters.protocol import Adapter
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.export.loading import load_adapter, read_adapter
from lit_personalize.export.pipeline import write_pipeline
from lit_personalize.merging.closed_form import Concept, merge_concepts
from lit_personalize.metrics import alignment
from lit_personalize.report.measures import OPTIONS, Judges, seeds_of
from lit_personalize.report.training import PHOTOS, RARE, Learned, Method, adapters_of, prepare, steps_of, train
from lit_personalize.sampling.sampler import generate
from lit_personalize.tinyworld.attributes import targets
from lit_personalize.tinyworld.captions import background_phrase, caption
from lit_personalize.tinyworld.concepts import HELD_OUT_CONCEPTS, Subject, subject_pictures
from lit_personalize.tinyworld.dataset import sample_pictures
from lit_personalize.tinyworld.pair_scenes import asked_pairs, pair_prompt, pair_scene, pair_shares
from lit_personalize.tinyworld.render import render
from lit_personalize.tinyworld.style_concepts import PLACES, style_pictures, styled_scene, styled_subject_shares
from lit_personalize.tinyworld.suite import prompts_of, shares

TWO_SUBJECTS, SUBJECT_IN_STYLE = "two subjects", "subject in style"
COMBINATIONS: dict[str, tuple[str, ...]] = {
    TWO_SUBJECTS: (
        "small-lime-circle + small-maroon-hexagon", "small-navy-oval + small-olive-heart",
        "small-lime-circle + small-olive-heart",
    ),
    SUBJECT_IN_STYLE: ("critter-03 + negative", "critter-11 + blueprint", "olive-zigzag-heart + posterized"),
}  # fmt: skip
WAYS: dict[str, tuple[str, ...]] = {
    TWO_SUBJECTS: ("joint", "closed form", "sequential", "addition"),
    SUBJECT_IN_STYLE: ("subject alone", "style alone", "addition", "ZipLoRA", "K-LoRA"),
}
LEARNED_BY = {TWO_SUBJECTS: Method("custom_diffusion/tinyworld"), SUBJECT_IN_STYLE: Method("dreambooth_lora/tinyworld")}
ASKED = 16
"""Pictures of a subject in a style."""
ZIP = Method("ziplora/tinyworld", "none")
TOKENS, STYLE_WORD = ("<new1>", "<new2>"), "ktn"
CAPTIONS = 1000
"""Of base pictures, in which the closed form changes least."""

Way = tuple[Base, list[Adapter]]
Measured = tuple[dict[str, float], list[np.ndarray]]


def run_combination(
    kind: str, name: str, seed: int, weights: Path, cache: Path, steps: int | None = None
) -> dict[str, Any]:
    """Learn two concepts, combine them in every way and measure each.

    "shown" is a picture of every way, after the real and the base's.
    """
    started = time.monotonic()
    run: Callable[..., Measured] = _two_subjects if kind == TWO_SUBJECTS else _subject_in_style
    with tempfile.TemporaryDirectory() as folder:
        figures, shown = run(Path(folder), *name.split(" + "), seed, weights, cache, steps)
    return {**figures, "seconds": round(time.monotonic() - started), "shown": np.concatenate(shown, axis=1)}


def _two_subjects(
    work: Path, first: str, second: str, seed: int, weights: Path, cache: Path, steps: int | None
) -> Measured:
    method = LEARNED_BY[TWO_SUBJECTS]
    learned = [prepare(work, of, seed, method, cache, word) for of, word in zip((first, second), TOKENS, strict=True)]
    alone = [
        train(work, f"alone-{i}", method, [one], seed, steps, _with_tokens(TOKENS[i])).exports
        for i, one in enumerate(learned)
    ]
    twice = 2 * (steps or steps_of(method))
    joint = train(work, "joint", method, learned, seed, twice, _with_tokens(*TOKENS)).exports
    untouched = load_base("tinyworld")
    folder = write_pipeline(read_adapter(alone[0], untouched), untouched, work / "with-first")
    after = train(work, "second-after-first", method, learned[1:], seed, steps,
                  (*_with_tokens(TOKENS[1]), "--model.init_args.base", str(folder))).exports  # fmt: skip

    def with_adapters(*places: Path, base: str | Path = "tinyworld") -> Way:
        loaded = load_base(base)
        return loaded, [load_adapter(place, loaded) for place in places]

    ways = {
        "joint": with_adapters(joint), "closed form": _closed_form(alone, learned, seed),
        "sequential": with_adapters(after, base=folder), "addition": with_adapters(*alone),
    }  # fmt: skip
    subjects = (HELD_OUT_CONCEPTS[first], HELD_OUT_CONCEPTS[second])
    asked = asked_pairs(*subjects)
    nouns = [subject.class_noun for subject in subjects]
    calls = [f"{token} {noun}" for token, noun in zip(TOKENS, nouns, strict=True)]
    prompts = [pair_prompt(calls[0], calls[1], *how) for how in asked]
    plain = [pair_prompt(nouns[0], nouns[1], *how) for how in asked]
    real = np.stack([render(pair_scene(*subjects, *how)) for how in asked])
    judges = Judges.of(weights)
    figures: dict[str, float] = {}
    shown = []
    texts = judges.clip.texts(plain)
    pictures = {"real": real, "base": generate(untouched, plain, seeds_of(seed, plain), None, OPTIONS)}
    for way, (base, adapters) in ways.items():
        pictures[way] = generate(base, prompts, seeds_of(seed, prompts), adapters, OPTIONS)
        for number, subject in enumerate(subjects):
            found = _single(subject, base, adapters, judges, seed, TOKENS[number])
            figures |= {f"{way}: {name}, subject {number + 1} of 2": value for name, value in found.items()}
    for number, subject in enumerate(subjects):  # what each adapter knew before it was combined
        base, adapters = with_adapters(alone[number])
        found = _single(subject, base, adapters, judges, seed, TOKENS[number])
        figures |= {f"alone: {name}, subject {number + 1} of 2": value for name, value in found.items()}
    for way, pixels in pictures.items():
        found = pair_shares(pixels, *subjects, asked, judges.reader)
        figures |= {f"{way}: {name}": value for name, value in found.items()}
        figures[f"{way}: CLIP-T"] = alignment.text_alignment(judges.clip.images(pixels), texts)
        shown.append(pixels[0])
    return figures, shown


def _closed_form(alone: Sequence[Path], learned: Sequence[Learned], seed: int) -> Way:
    base = load_base("tinyworld")
    concepts = [
        Concept(read_adapter(place, base), HELD_OUT_CONCEPTS[one.name].class_noun)
        for place, one in zip(alone, learned, strict=True)
    ]
    captions = [caption(scene) for scene in sample_pictures(CAPTIONS, seed + 60).scenes]
    merged = LoadedAdapter(merge_concepts(base, concepts, captions)[0], "closed form")
    base = load_base("tinyworld")  # the merge has added its tokens to the other
    merged.attach(base)
    return base, [merged]


def _single(
    subject: Subject, base: Base, adapters: Sequence[Adapter], judges: Judges, seed: int, word: str
) -> dict[str, float]:
    """One of the subjects by itself."""
    asked = prompts_of(subject, word)
    prompts = [prompt for prompt, _ in asked]
    drawn = generate(base, prompts, seeds_of(seed, prompts), adapters, OPTIONS)
    found = shares(drawn, subject, [ground for _, ground in asked], judges.reader)
    return {"attributes": found["attributes"], "background": found["background"]}


def _with_tokens(*tokens: str) -> tuple[str, ...]:
    """The recipe's adapters with these tokens instead of its one."""
    adapters = adapters_of(LEARNED_BY[TWO_SUBJECTS])
    rows = next(entry for entry in adapters if entry["class_path"] == "TokenEmbedding")
    several = [{**rows, "init_args": {**rows["init_args"], "token": token}} for token in tokens]
    others = [entry for entry in adapters if entry is not rows]
    return ("--model.init_args.adapters", json.dumps([*others, *several]))


def _subject_in_style(
    work: Path, subject_name: str, style: str, seed: int, weights: Path, cache: Path, steps: int | None
) -> Measured:
    method, subject = LEARNED_BY[SUBJECT_IN_STYLE], HELD_OUT_CONCEPTS[subject_name]
    content, manner = (
        prepare(work, name, seed, method, cache, word) for name, word in ((subject_name, RARE), (style, STYLE_WORD))
    )
    runs = (("content", content), ("style", manner))
    places = [train(work, run, method, [one], seed, steps).exports for run, one in runs]
    parts = [{"class_path": "ZipLoRA", "init_args": {"content": str(places[0]), "style": str(places[1])}}]
    zipped = train(work, "zipped", ZIP, [replace(content, regularization=""), replace(manner, regularization="")], seed,
                   steps, ("--model.init_args.adapters", json.dumps(parts))).exports  # fmt: skip
    base = load_base("tinyworld")
    of_content, of_style = (read_adapter(place, base) for place in places)
    loaded = {
        "content": LoadedAdapter(of_content, "content"), "style": LoadedAdapter(of_style, "style"),
        "zipped": LoadedAdapter(read_adapter(zipped, base), "zipped"), "selected": KLoRA(of_content, of_style),
    }  # fmt: skip
    for adapter in loaded.values():
        adapter.attach(base)
    ways = {"subject alone": ["content"], "style alone": ["style"], "addition": ["content", "style"],
            "ZipLoRA": ["zipped"], "K-LoRA": ["selected"]}  # fmt: skip
    # A white texture is lost in the snow: nothing of such a subject could be read there.
    clear = [place for place in PLACES if targets(styled_scene(subject, style, place, 0)).keys() & subject.attributes]
    asked = [clear[i % len(clear)] for i in range(ASKED)]
    plain = [f"a {subject.class_noun} {background_phrase(place)}" for place in asked]
    prompts = [f"a {RARE} {said.removeprefix('a ')} in {STYLE_WORD} style" for said in plain]
    judges = Judges.of(weights)
    scenes = [styled_scene(subject, style, place, i) for i, place in enumerate(asked)]
    pictures = {"real": np.stack([render(scene) for scene in scenes]),
                "base": generate(base, plain, seeds_of(seed, plain), [], OPTIONS)}  # fmt: skip
    for way, names in ways.items():
        pictures[way] = generate(base, prompts, seeds_of(seed, prompts), [loaded[name] for name in names], OPTIONS)
    texts = judges.clip.texts(plain)
    near_subject = judges.clip.images(subject_pictures(subject, PHOTOS, seed).pixels)
    near_style = judges.clip.images(style_pictures(style, PHOTOS, seed).pixels)
    figures: dict[str, float] = {}
    shown = []
    for way, pixels in pictures.items():
        features = judges.clip.images(pixels)
        found = styled_subject_shares(pixels, scenes, subject, judges.reader) | {
            "CLIP-I to subject": alignment.image_alignment(features, near_subject),
            "CLIP-I to style": alignment.image_alignment(features, near_style),
            "CLIP-T": alignment.text_alignment(features, texts),
        }
        figures |= {f"{way}: {name}": value for name, value in found.items()}
        shown.append(pixels[0])
    return figures, shown
