"""Regularization sets that differ in nothing but their pictures, and cells that are not measured twice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lit_personalize.report.retrieval import effect
from lit_personalize.report.training import Method
from lit_personalize.tinyworld.build import committed_weights
from lit_personalize.tinyworld.concepts import HELD_OUT_CONCEPTS
from lit_personalize.tinyworld.corpus import write_corpus
from lit_personalize.tinyworld.dataset import read_tar

CLIP = committed_weights() / "clip"


def quiet(_: str) -> None:
    """Progress is not looked at here."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("effect")
    write_corpus(folder / "corpus", 60, 20, log=quiet)
    return folder


def captions(given: str) -> list[bytes]:
    [path] = re.findall(r'"(.*?)"', given)
    return [members["txt"] for _, members in read_tar(Path(path))]


def test_the_random_set_is_drawn_from_the_whole_corpus(work: Path) -> None:
    whole = [m["txt"] for shard in sorted((work / "corpus").glob("0*.tar")) for _, m in read_tar(shard)]
    first, again, other = (captions(effect.random_set(work, seed, 12)) for seed in (0, 0, 1))
    assert first == again != other and len(first) == len(other) == 12
    assert set(first) <= set(whole) and len({whole.index(text) // 20 for text in first}) == 3
    with pytest.raises(effect.DataError, match="has 60 pairs, 61 are needed"):
        effect.random_set(work, 0, 61)


def test_the_retrieved_set_shows_the_class(work: Path) -> None:
    subject = HELD_OUT_CONCEPTS["critter-03"]
    given, count = effect.retrieved_set(subject, work, CLIP, 6)
    found = captions(given)
    assert len(found) == count == 6
    kept = (work / "set-critter/00000.tar").stat().st_mtime_ns
    assert effect.retrieved_set(subject, work, CLIP, 6) == (given, 6)
    assert (work / "set-critter/00000.tar").stat().st_mtime_ns == kept, "retrieved once"


def test_cells_differ_in_the_set_alone_and_are_measured_once(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training itself is tested with the matrix of methods."""
    asked: list[tuple[Any, ...]] = []

    def train(
        subject: str, seed: int, method: Method, weights: Path, cache: Path, steps: int | None, regularization: str
    ) -> dict[str, Any]:
        asked.append((subject, seed, method.recipe, regularization))
        return {"CLIP-I": 0.5, "seconds": 1, "shown": None}

    monkeypatch.setattr(effect, "train_and_measure", train)
    monkeypatch.setattr(effect, "SEEDS", (0, 1))
    monkeypatch.setattr(effect, "N", 6)
    monkeypatch.setattr(effect.run_cell, "__defaults__", (6, None))
    command = [str(work), "--clip", str(CLIP), "--out", str(tmp_path)]
    assert effect.main([*command, "--budget", "0m"]) == 0 and not asked
    assert effect.main(command) == 0
    assert len(asked) == len(effect.load_cells(tmp_path)) == 2 * len(effect.SUBJECTS) * len(effect.SETS)
    for subject in effect.SUBJECTS:
        for seed in (0, 1):
            mine = [given for *rest, given in asked if rest == [subject, seed, effect.RECIPE]]
            assert len(set(mine)) == 3 and sum("generate: 200" in given for given in mine) == 1
    assert effect.main(command) == 0 and len(asked) == 12, "nothing is repeated"
    place = effect.cell_path(tmp_path, "random", effect.SUBJECTS[0], 1)
    row = json.loads(place.read_text())
    assert row["pictures"] == 6 and row["encoder"] == effect.caption_tower(CLIP) and "shown" not in row
    place.write_text(json.dumps({**row, "recipe": "0" * 16}))
    assert ("random", effect.SUBJECTS[0], 1) not in effect.load_cells(tmp_path), "of another recipe or base"
    assert effect.main(command) == 0 and len(asked) == 13
