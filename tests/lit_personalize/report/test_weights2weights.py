"""What is measured of a corpus of critters, on planted ones; and the page of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_personalize.adapters.lora import LoRA
from lit_personalize.backbones.loading import load_base
from lit_personalize.corpus.layout import Layout
from lit_personalize.corpus.store import Corpus
from lit_personalize.export.exporter import export
from lit_personalize.report import weights2weights as science
from lit_personalize.report.identities import Painter, drawn_from_files, found, prompts_for, train
from lit_personalize.report.weights2weights_figure import draw_accuracy
from lit_personalize.report.weights2weights_page import COMPONENTS, WORLD, weights2weights_tables
from lit_personalize.tinyworld.attributes import Reading
from lit_personalize.tinyworld.identities import identity, labels_of
from lit_personalize.tinyworld.vocabulary import CRITTER_ATTRIBUTES


@pytest.fixture
def planted(tmp_path: Path) -> Corpus:
    """Adapters whose numbers are their labels, and noise."""
    lora = LoRA(rank=1, alpha=27, targets="query_value", init="kaiming", init_seed=0)
    lora.attach(load_base("tinyworld"))
    weights = lora.export_weights()
    layout = Layout.of(weights)
    draws = torch.Generator().manual_seed(0)
    told = [labels_of(identity(number)) for number in range(90)]
    y = torch.tensor([[line[a] for a in CRITTER_ATTRIBUTES] for line in told])
    rows = layout.flatten(weights) + 0.01 * y @ torch.randn(8, layout.width, generator=draws)
    rows = rows + 0.01 * torch.randn(rows.shape, generator=draws)
    corpus = Corpus.create(tmp_path / "corpus", layout, base_fingerprint="b", init_seed=0, dtype="float32")
    corpus.append(rows, [{"id": f"identity-{n:05d}", "labels": line} for n, line in enumerate(told)])
    return corpus


def test_a_critter_is_found_with_one_part_wrong_and_not_with_two() -> None:
    subject = identity(3)
    true = Reading({"kind": "critter", **subject.attributes})
    assert found(true, subject)
    wrong = {"present": "absent", "absent": "present"}
    names = dict(true.names)
    for count, part in enumerate(list(CRITTER_ATTRIBUTES)[:2], start=1):
        names[f"critter_{part}"] = wrong[names[f"critter_{part}"]]
        assert found(replace(true, names=dict(names)), subject) == (count < 2)
    assert not found(replace(true, names={**true.names, "color": "lime"}), subject)
    assert not found(replace(true, names={**true.names, "kind": "person"}), subject)


def test_held_out_accuracy_is_that_of_planted_labels(planted: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(science, "HELD_OUT", 30)
    monkeypatch.setattr(science, "SIZES", (20,))
    accuracy = science.attributes(planted)["accuracy"]
    assert list(accuracy) == ["20", "60"] and accuracy["20"]["draws"] == 3 and accuracy["60"]["draws"] == 1
    assert accuracy["60"]["mean"] > 0.95
    labels = planted.labels()
    shuffled = {
        name: values[torch.randperm(90, generator=torch.Generator().manual_seed(1))] for name, values in labels.items()
    }
    monkeypatch.setattr(Corpus, "labels", lambda self: shuffled)
    assert abs(science.attributes(planted)["accuracy"]["60"]["mean"] - 0.5) < 0.15, "labels of others are not read"


def test_an_edit_ends_where_it_was_told(planted: Corpus) -> None:
    space = science.space_of(planted, range(60))
    direction = science.directions.find(space.coefficients, planted.labels()["hat"][:60], "hat")
    row = planted.row(planted.ids[70])
    by = science.to_deviations(direction, space, row, -3)
    moved = direction.along(space.project(row + direction.step(space, by)))
    middle = direction.along(space.coefficients).mean()
    assert float((moved - middle) / direction.deviation) == pytest.approx(-3, abs=1e-2)


def test_flips_are_counted_for_the_part_that_was_edited() -> None:
    """Values come critter by critter, each with all parts in turn."""
    flips = {part: (number % 2, number / 10) for number, part in enumerate(CRITTER_ATTRIBUTES)}
    values = [{"flipped": flips[part][critter]} for critter in range(2) for part in CRITTER_ATTRIBUTES]
    expected = {part: (first + second) / 2 for part, (first, second) in flips.items()}
    assert science.by_part(values) == pytest.approx(expected)


def test_a_packed_adapter_is_drawn_as_its_file(tmp_path: Path) -> None:
    """Files hold alpha in B, the recipe's LoRA does not."""
    painter, subject = Painter.of_recipe(), identity(0)
    ((_, adapters),) = train(Painter.of_recipe().objective, [subject], [2], pictures=2)
    weights = adapters[subject.name]
    base = load_base("tinyworld")
    [file] = export(weights, tmp_path, base, "critter", ["diffusers"])
    prompts = prompts_for(subject)[0][:2]
    drawn, wanted = painter.draw(weights, prompts, 5), drawn_from_files([file.path], prompts, 5)
    assert np.abs(drawn.astype(int) - wanted.astype(int)).max() <= 2
    untouched = {layer: replace(f, up=0 * f.up) for layer, f in weights.low_rank.items()}
    other = painter.draw(replace(weights, low_rank=untouched), prompts, 5)
    assert np.abs(drawn.astype(int) - other.astype(int)).max() > 20, "the adapter is applied at all"


def test_the_page_says_what_was_recorded_and_what_was_not(tmp_path: Path) -> None:
    assert weights2weights_tables(tmp_path).count("not measured yet") == 5
    about = {"date": "2026-01-01", "commit": "abc", "cores": 2, "adapters": 2100, "held out": 100}
    way = {"flipped": 0.81, "found": 0.5, "other parts": 0.9, "parts": 0.9, "color": 1.0, "CLIP-I": 0.7}
    accuracy = {"by attribute": {"hat": [0.8, 1.0]}, "mean": 0.9}
    ways = {"to 3 deviations": way, "prompt": {**way, "flipped": 0.9}}
    edited = {"critters": 1, "edits": 8, "pictures of each": 4, "ways": ways,
              "flipped by part": {"to 3 deviations": {"hat": 0.75}}}  # fmt: skip
    again = {**edited, "ways": {**ways, "to 3 deviations": {**way, "flipped": 0.83}}}
    (tmp_path / WORLD).write_text(json.dumps({
        "steps": {**about, "critters": 4, "pictures of each": 4, "found": {"10": [0.5, 0.7]}, "fewest": None},
        "attributes": {**about, "accuracy": {"100": accuracy}},
        "edits": {**about, "seeds": {"0": edited, "1": again}},
        "inversion": {**about, "seeds": {"0": {"critters": 2, "ways": {
            "inversion": {**way, "CLIP-I": 0.1}, "DreamBooth-LoRA": {**way, "parts": 0.8}}}}},
    }))  # fmt: skip
    run = {"way": "randomized", "rows": 8000, "components": 10, "seconds": 9.6, "peak bytes": 3e9}
    (tmp_path / COMPONENTS).write_text(json.dumps({
        **about, "D": 100, "dtype": "float16", "components before the gap": 5,
        "runs": [{**run, "share of product rate": 0.61, "degrees to gram before the gap": 0.086},
                 {"way": "IncrementalPCA", "rows": 8000, "stopped": "not done after 1 s"},
                 {**run, "rows": 1000, "share of product rate": 0.2}],
        "the published corpus (arithmetic)": {"rows": 64974, "bytes as fp16": 13e9, "hours, randomised": 0.25},
    }))  # fmt: skip
    text = weights2weights_tables(tmp_path)
    for line in (
        "| 10 | 0.500, 0.700 | 0.600 |", "None of these is enough", "| hat | 0.900 |", "is reached: 0.900",
        "| to 3 deviations | 0.810, 0.830 | 0.820 | 0.900 | 1.000 | 0.700 |", "0.80 flipped is reached: 0.820 to 3",
        "| prompt | 0.900, 0.900 |", "space of 2,000 others", "two seeds of the noise", "to 3 deviations: hat 0.750.",
        "ahead in parts (", "| inversion | 0.100 | 0.100 | 0.500 | 0.900 | 1.000 |", "one seed of the picture",
        "default at this size, is reached: 61%", "| 8,000 | randomized | 10 | 0.61 | 3.0 | 0.086° |",
        "| 8,000 | IncrementalPCA | not done after 1 s | | | |", "13.0 GB as fp16) at",
    ):  # fmt: skip
        assert line in text, f"{line}\n{text}"


def test_the_figure_shows_what_was_recorded(tmp_path: Path) -> None:
    """Higher accuracies are drawn higher up; without any there is no figure."""
    recorded, figure = tmp_path / WORLD, tmp_path / "figure.png"
    assert not draw_accuracy(recorded, figure)
    heights = []
    for last in (0.7, 0.95):
        accuracy = {"100": {"by attribute": {"hat": [0.6, 0.6], "tail": [0.6, 0.6]}},
                    "2000": {"by attribute": {"hat": [last], "tail": [last]}}}  # fmt: skip
        recorded.write_text(json.dumps({"attributes": {"accuracy": accuracy}}))
        assert draw_accuracy(recorded, figure)
        dark = np.asarray(Image.open(figure).convert("L")) < 60
        right = dark[:, int(0.9 * dark.shape[1]) :]  # the last point of the thick line, right of the legend's middle
        heights.append(int(np.argmax(right.any(axis=1))))
    assert heights[1] < heights[0] - 50
