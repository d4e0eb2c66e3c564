"""`litp w2w fit`: from a corpus on disk to its space, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lit_personalize.cli.main import main
from lit_personalize.corpus.store import Corpus
from lit_personalize.errors import DataError
from lit_personalize.weights2weights.subspace import Subspace


def told(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict[str, object]:
    capsys.readouterr()
    ended = main(["w2w", "fit", *map(str, arguments), "--json"])
    printed = capsys.readouterr()
    assert ended == code, printed.err
    found: dict[str, object] = json.loads(printed.out) if not code else {"error": printed.err}
    return found


@pytest.mark.parametrize("method", ["gram", "randomized"])
def test_the_space_is_that_of_the_rows(method: str, planted, tmp_path: Path, capsys) -> None:
    report = told(capsys, planted.corpus, "-o", tmp_path / "space", "--components", 8, "--method", method)
    space = Subspace.load(tmp_path / "space")
    assert report["adapters"] == 60 and report["components"] == 8 and report["method"] == method
    overlap = space.components @ planted.space.components.T
    assert torch.linalg.svdvals(overlap).min() > 0.999, "the same space"
    assert torch.allclose(space.variances, planted.space.variances, rtol=1e-3)
    assert space.ids == planted.space.ids and space.details["base_fingerprint"] == planted.base.fingerprint
    assert torch.allclose(space.project(planted.rows), space.coefficients, atol=1e-2)
    explained = report["explained"]["8"]
    assert explained == pytest.approx(float(space.variances.sum()) / space.details["total_variance"], abs=1e-3)
    assert not (tmp_path / "space" / ".work").exists()
    capsys.readouterr()
    assert main(["w2w", "sample", str(tmp_path / "space"), "-o", str(tmp_path / "new"), "--verify", "none"]) == 0


def test_more_components_than_there_are_is_said(planted, tmp_path: Path, capsys, caplog) -> None:
    assert told(capsys, planted.corpus, "-o", tmp_path / "space", "--components", 500)["components"] == 59
    assert "60 adapters have 59 components" in caplog.text


def test_adapters_that_began_differently_are_refused_and_sketched(planted, tmp_path: Path, capsys) -> None:
    known = Corpus.open(planted.corpus)
    corpus = Corpus.create(
        tmp_path / "corpus", known.layout, base_fingerprint=known.base_fingerprint, init_seed=None, dtype="float32"
    )
    corpus.append(planted.rows, [{"id": name} for name in known.ids])
    error = told(capsys, corpus.folder, "-o", tmp_path / "space", code=2)["error"]
    assert "gauge unknown" in error and "--sketch 64" in error
    report = told(capsys, corpus.folder, "-o", tmp_path / "space", "--sketch", 16, "--components", 8)
    space = Subspace.load(tmp_path / "space")
    assert report["numbers"] == 16 * len(known.layout.layers) and space.details["sketch"] == {"size": 16, "seed": 0}
    with pytest.raises(DataError, match="without --sketch"):
        space.unproject(torch.zeros(8))


def test_no_corpus_says_how_to_make_one(tmp_path: Path, capsys) -> None:
    assert "litp bank pack" in told(capsys, tmp_path, "-o", tmp_path / "space", code=3)["error"]
