"""Precision and recall: by hand, and of a small corpus that goes the whole way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lit_personalize.errors import DataError
from lit_personalize.metrics.caption_encoder import CaptionEncoder
from lit_personalize.report.retrieval import pages, quality
from lit_personalize.report.retrieval.quality import Pair, facts_of
from lit_personalize.report.retrieval.queries import Asked, asked, scenes_showing
from lit_personalize.tinyworld.build import committed_weights
from lit_personalize.tinyworld.render import render

RED_HEART = Asked("shape, colour", "a photo of a red heart", facts_of([("shape", "heart"), ("color", "red")]))
CLIP = committed_weights() / "clip"
PAIRS, N = 300, 12


def pair(key: str, caption: str, shape: str, color: str, said: bool = True) -> Pair:
    shown = facts_of([("shape", shape), ("color", color), ("background", "white")])
    return Pair(Path("00000.tar"), key, caption, shown, shown if said else facts_of([("shape", shape)]))


CORPUS = [
    pair("a", "a red heart", "heart", "red"),
    pair("b", "hearty breakfast, a red circle", "circle", "red"),
    pair("c", "love symbol", "heart", "red", said=False),
    pair("d", "a blue heart on red", "heart", "blue"),
    pair("e", "a scarlet valentine", "heart", "red"),
    pair("f", "red heart stock photo", "heart", "red"),
]


@pytest.mark.parametrize(
    ("search", "n", "keys"), [("substring", 9, "abdf"), ("substring", 3, "abd"), ("words", 9, "adf"), ("words", 1, "a")]
)
def test_searches_for_words_take_the_first_that_have_all(search: str, n: int, keys: str) -> None:
    assert "".join(p.key for p in quality.matching(search, RED_HEART, CORPUS, n)) == keys


def test_precision_counts_all_places_and_recall_all_relevant_pictures() -> None:
    row: dict[str, Any] = {"relevant": 4, "said": 3}
    for search, keys in (("clip", "acde"), ("substring", "abdf"), ("words", "")):
        got = [p.facts for p in CORPUS if p.key in keys]
        row[search] = quality.judge(got, RED_HEART.facts)
    assert row["clip"] == {"found": 4, "hits": 3} and row["words"] == {"found": 0, "hits": 0}
    assert pages.share(row, "clip", "precision", 5) == pytest.approx(3 / 5)
    assert pages.share(row, "clip", "recall", 5) == pytest.approx(3 / 4)
    assert pages.share(row, "substring", "precision", 5) == pytest.approx(2 / 5)
    assert pages.share(row, "words", "recall", 5) == 0
    assert pages.ceiling([row], "precision", 5) == pytest.approx(3 / 5)
    assert pages.ceiling([row], "recall", 2) == pytest.approx(2 / 4)


def test_named_share() -> None:
    hearts = Asked("class alone", "a photo of a heart", facts_of([("shape", "heart")]))
    assert quality.named_share(CORPUS, [hearts]) == pytest.approx(3 / 5)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quality")
    given = ["--pairs", str(PAIRS), "--per-shard", "100", "--n", str(N), "--clip", str(CLIP)]
    assert quality.main([str(folder / "work"), *given, "--out", str(folder / "docs" / pages.FOLDER)]) == 0
    return folder


def test_a_small_corpus_gives_the_figures_that_a_direct_comparison_gives(work: Path) -> None:
    found = json.loads((work / "docs" / pages.FOLDER / "quality.json").read_text())
    corpus = quality.read_pairs(sorted((work / "work/corpus").glob("[0-9]*.tar")))
    assert found["pairs"] == len(corpus) == PAIRS and 0.3 < found["named"] < 0.5 and found["cpu seconds"] > 0
    encoder = CaptionEncoder(CLIP)
    vectors = encoder.texts([pair.caption for pair in corpus])
    rows = {(row["text"], row["pictures"]): row for row in found["rows"]}
    assert len(rows) > 60 and found["encoder"] == encoder.fingerprint
    for number, query in enumerate(asked()):
        relevant = sum(query.facts <= pair.facts for pair in corpus)
        if not relevant:
            assert (query.text, query.pictures) not in rows
            continue
        if query.pictures:
            for i, scene in enumerate(scenes_showing(query, number)):
                Image.fromarray(render(scene)).save(work / f"asked{i}.png")
            each = [encoder.image(work / f"asked{i}.png")[0] for i in range(query.pictures)]
            asking = np.mean(each, 0) / np.linalg.norm(np.mean(each, 0))
        else:
            asking = encoder.texts([query.text])[0]
        best = np.argsort(-(vectors @ asking).round(5), kind="stable")[:N]
        hits = sum(query.facts <= corpus[i].facts for i in best)
        row = rows[query.text, query.pictures]
        assert (row["relevant"], row["clip"]) == (relevant, {"found": N, "hits": hits}), query
        assert row["words"]["hits"] <= row["words"]["found"] <= row["substring"]["found"] <= N


def test_the_sheet_frames_what_was_not_asked(work: Path) -> None:
    image = np.asarray(Image.open(work / "docs" / pages.FOLDER / "pictures.png").convert("RGB")).astype(int)
    red = np.abs(image - (220, 0, 0)).sum(2) < 30
    assert red.any() and image.shape[1] > 12 * 128


def test_the_page_of_the_small_corpus(work: Path) -> None:
    place = work / "docs" / pages.PAGE
    given = ["--docs", str(work / "docs")]
    assert pages.main([*given, "--check"]) == 1 and not place.exists()
    assert pages.main(given) == 0 and pages.main([*given, "--check"]) == 0
    text = place.read_text()
    assert text.startswith("# How good") and f"{PAIRS} rendered pairs" in text and "open, 0 of 6 pairs" in text


def test_a_command_that_fails_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="litp data retrieve ended with 3"):
        quality.retrieve([tmp_path / "corpus/00000.tar"], [RED_HEART], CLIP, 2, tmp_path / "out")
