"""Weights2Weights measured on the embedded world: the parts of benchmarks/weights2weights.py."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_personalize.corpus.store import Corpus
from lit_personalize.metrics.alignment import image_alignment
from lit_personalize.report.identities import PROMPTS, Painter, drawn_from_files, found, prompts_for, train
from lit_personalize.report.measures import Judges
from lit_personalize.report.training import REGULARIZATION, Learned, Method
from lit_personalize.report.training import train as train_run
from lit_personalize.tinyworld import dataset
from lit_personalize.tinyworld import vocabulary as v
from lit_personalize.tinyworld.build import committed_weights
from lit_personalize.tinyworld.concepts import Subject, class_pictures, subject_pictures
from lit_personalize.tinyworld.identities import WORD, captions_of, identity, shown_before, with_part
from lit_personalize.tinyworld.vocabulary import CRITTER_ATTRIBUTES
from lit_personalize.weights2weights import directions
from lit_personalize.weights2weights.components import principal_components
from lit_personalize.weights2weights.directions import Direction
from lit_personalize.weights2weights.subspace import Subspace

HELD_OUT = 100
"""The last adapters of a corpus, from which nothing is learned."""
SIZES = (100, 500, 2000)
SEEDS = (0, 1, 2)
STEPS = (10, 20, 30, 40, 50, 60)
SHARE = 0.8
EDITED = 8
FAR = (2, 3, 4)
"""Where edits end, in deviations of the corpus; the paper goes as far as the furthest adapter."""
INVERTED = 6


@dataclass
class Some:
    """Some of a corpus's rows."""

    corpus: Corpus
    places: Sequence[int]

    @property
    def width(self) -> int:
        return self.corpus.width

    @property
    def ids(self) -> list[str]:
        return [self.corpus.ids[place] for place in self.places]

    @property
    def fingerprint(self) -> str:
        return self.corpus.fingerprint

    def __len__(self) -> int:
        return len(self.places)

    def gather(self, indices: Sequence[int]) -> Tensor:
        return self.corpus.gather([self.places[index] for index in indices])


def subject_of(corpus: Corpus, place: int) -> Subject:
    """The critter that an adapter was trained on."""
    return identity(int(corpus.ids[place].rpartition("-")[2]))


def steps(corpus: Corpus) -> dict[str, Any]:
    """Share of pictures in which critters that are in no corpus are found, over the steps of their adapters."""
    del corpus  # the same recipe, other critters
    painter, judges = Painter.of_recipe(), Judges.of(committed_weights())
    subjects = [identity(90_000 + number) for number in range(16)]
    shares: dict[int, list[list[float]]] = {step: [] for step in STEPS}
    for seed in SEEDS:
        for step, adapters in train(Painter.of_recipe().objective, subjects, STEPS, seed=seed):
            own = []
            for subject in subjects:
                pixels = painter.draw(adapters[subject.name], prompts_for(subject)[0], seed)
                own.append(float(np.mean([found(reading, subject) for reading in judges.reader.read(pixels)])))
            shares[step].append(own)
    curve = {str(step): [round(float(np.mean(own)), 3) for own in shares[step]] for step in STEPS}
    enough = [step for step in STEPS if float(np.mean(shares[step])) >= SHARE]
    return {"critters": len(subjects), "pictures of each": PROMPTS, "found": curve, "fewest": min(enough, default=None)}


def space_of(corpus: Corpus, places: Sequence[int]) -> Subspace:
    """The exact space of some of a corpus's adapters."""
    rows = Some(corpus, list(places))
    found = principal_components(rows, min(1000, len(rows) - 1), "gram")
    told = {"base_fingerprint": corpus.base_fingerprint}
    return Subspace(
        corpus.layout, found.mean, found.deviation, found.components, found.variances, found.coefficients, rows.ids,
        told,
    )  # fmt: skip


def attributes(corpus: Corpus) -> dict[str, Any]:
    """Balanced accuracy on held-out adapters by size of the corpus, attribute and draw."""
    known = len(corpus) - HELD_OUT
    labels = corpus.labels()
    held_out = corpus.gather(range(known, len(corpus)))
    sizes = [size for size in SIZES if size <= known] + [known] * (known not in SIZES)
    result: dict[str, Any] = {}
    for size in sorted(sizes):
        draws = SEEDS if size < known else SEEDS[:1]  # of the whole there is one draw
        accuracies: dict[str, list[float]] = {name: [] for name in CRITTER_ATTRIBUTES}
        for seed in draws:
            order = torch.randperm(known, generator=torch.Generator().manual_seed(seed)).tolist()[:size]
            space = space_of(corpus, order)
            for name in CRITTER_ATTRIBUTES:
                direction = directions.find(space.coefficients, labels[name][order], name)
                said = direction.along(space.project(held_out)) > direction.threshold
                truth = labels[name][known:] > 0.5
                right = (said == truth).float()
                accuracies[name].append(round(float(right[truth].mean() + right[~truth].mean()) / 2, 4))
        every = [value for values in accuracies.values() for value in values]
        result[str(size)] = {"by attribute": accuracies, "mean": round(float(np.mean(every)), 4), "draws": len(draws)}
    return {"accuracy": result}


def edits(corpus: Corpus, seed: int) -> dict[str, Any]:
    """Flip every part of held-out critters along its direction, and by the prompt; the seed is that of the noise."""
    painter, judges = Painter.of_recipe(), Judges.of(committed_weights())
    known, labels = len(corpus) - HELD_OUT, corpus.labels()
    space = space_of(corpus, range(known))
    own = {a: directions.find(space.coefficients, labels[a][:known], a) for a in CRITTER_ATTRIBUTES}
    others = {a: [own[b] for b in CRITTER_ATTRIBUTES if b != a] for a in own}
    alone = {a: directions.without(own[a], others[a], space.coefficients, "orthogonal") for a in own}
    ways: dict[str, list[dict[str, float]]] = {}
    for number in range(known, known + EDITED):
        subject, row = subject_of(corpus, number), corpus.row(corpus.ids[number])
        prompts, grounds = prompts_for(subject)
        for count, (part, said) in enumerate(v.CRITTER_ATTRIBUTES.items()):
            noise = 100 * seed + count
            present = part not in subject.critter_parts
            wanted = with_part(subject, part, present)
            moves = [(f"to {far} deviations", own[part], far) for far in FAR]
            moves += [(f"to {FAR[1]} deviations, the other parts taken out", alone[part], FAR[1])]
            for name, direction, far in moves:
                by = to_deviations(direction, space, row, far if present else -far)
                pixels = painter.draw(corpus.layout.unflatten(row + direction.step(space, by)), prompts, noise)
                ways.setdefault(name, []).append(kept(judges, pixels, wanted, grounds, part))
            asked = [f"{text} with {said}" if present else text for text in prompts]
            pixels = painter.draw(corpus.layout.unflatten(row), asked, noise, "" if present else said)
            ways.setdefault("prompt", []).append(kept(judges, pixels, wanted, grounds, part))
            pixels = painter.draw(corpus.layout.unflatten(row), prompts, noise)
            ways.setdefault("no edit", []).append(kept(judges, pixels, wanted, grounds, part))
    return {
        "critters": EDITED, "edits": EDITED * len(own), "pictures of each": PROMPTS,
        "ways": {name: means(values) for name, values in ways.items()},
        "flipped by part": {name: by_part(values) for name, values in ways.items()},
    }  # fmt: skip


def inversion(corpus: Corpus, seed: int) -> dict[str, Any]:
    """One picture of each of some held-out critters, inverted, and learned by DreamBooth-LoRA.

    The seed is that of the picture, of the training and of the noise.
    """
    judges, known = Judges.of(committed_weights()), len(corpus) - HELD_OUT
    ways: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        space_of(corpus, range(known)).save(work / "space")
        adapter = {"class_path": "SubspaceLoRA", "init_args": {"space": str(work / "space"), "components": None}}
        inverted = Method("weights2weights_inversion/tinyworld", "none", (
            "--model.init_args.adapters", json.dumps([adapter]), "--checkpoint.every", "400"))  # fmt: skip
        dreambooth = Method("dreambooth_lora/tinyworld")
        for place in range(known, known + INVERTED):
            subject = subject_of(corpus, place)
            prompts, grounds = prompts_for(subject)
            photo = _photo(subject, work / subject.name, seed)
            [shard] = dataset.write_shards(class_pictures(subject, REGULARIZATION, 50), work / f"set-{subject.name}")
            learned = Learned(subject.name, WORD, f"{{path: {photo}, class_noun: critter}}", f'{{shards: "{shard}"}}')
            only = Learned(subject.name, WORD, learned.concept, "")
            for name, method, told in (("inversion", inverted, only), ("DreamBooth-LoRA", dreambooth, learned)):
                run = train_run(work, f"{subject.name}-{name}", method, [told], seed)
                files = sorted((run.path / "exports").glob("*.safetensors"))
                pixels = drawn_from_files(files, prompts, seed)
                ways.setdefault(name, []).append(kept(judges, pixels, subject, grounds))
            pixels = Painter.of_recipe().draw(corpus.adapter(corpus.ids[place]), prompts, seed)
            ways.setdefault("its adapter of ten pictures", []).append(kept(judges, pixels, subject, grounds))
    return {"critters": INVERTED, "ways": {name: means(values) for name, values in ways.items()}}


def _photo(subject: Subject, folder: Path, seed: int) -> Path:
    """One picture with its caption."""
    shown = subject_pictures(subject, 1, 77 + seed)
    (caption,) = captions_of(subject, [scene.background for scene in shown.scenes])
    folder.mkdir()
    Image.fromarray(shown.pixels[0]).save(folder / "00000.png")
    (folder / "00000.txt").write_text(caption + "\n", encoding="utf-8")
    return folder


def kept(
    judges: Judges, pixels: np.ndarray, subject: Subject, grounds: Sequence[str], part: str = ""
) -> dict[str, float]:
    """What is read of pictures that should show a subject; `part` is the one that was edited."""
    readings = judges.reader.read(pixels)
    others = [a for a in CRITTER_ATTRIBUTES if a != part]
    real = judges.clip.images(np.stack(list(shown_before(subject, grounds))))
    shares = [[r[f"critter_{a}"] == subject.attributes[f"critter_{a}"] for a in others] for r in readings]
    found_so = {
        "found": float(np.mean([found(r, subject) for r in readings])),
        "color": float(np.mean([r["color"] == subject.attributes["color"] for r in readings])),
        "other parts" if part else "parts": float(np.mean(shares)),
        "CLIP-I": image_alignment(judges.clip.images(pixels), real),
    }
    if part:
        head = f"critter_{part}"
        found_so["flipped"] = float(np.mean([r[head] == subject.attributes[head] for r in readings]))
    return found_so


def means(values: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each figure the mean."""
    return {name: round(float(np.mean([value[name] for value in values])), 4) for name in values[0]}


def by_part(values: Sequence[dict[str, float]]) -> dict[str, float]:
    """Share of flips of each part, of what `edits` gathered critter by critter."""
    parts = len(CRITTER_ATTRIBUTES)
    flips = [[value["flipped"] for value in values[place::parts]] for place in range(parts)]
    return {part: round(float(np.mean(own)), 4) for part, own in zip(CRITTER_ATTRIBUTES, flips, strict=True)}


def to_deviations(direction: Direction, space: Subspace, row: Tensor, far: float) -> float:
    """How far to go so that an adapter stands `far` deviations from the corpus's mean along a direction."""
    middle = direction.along(space.coefficients).mean()
    return far - float(direction.along(space.project(row)) - middle) / direction.deviation
