"""Finished adapters become rows, once each; those that do not belong together are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_personalize.backbones.base import Base
from lit_personalize.cli.main import main
from lit_personalize.corpus.labels import read_labels
from lit_personalize.corpus.packing import pack
from lit_personalize.corpus.store import Corpus
from lit_personalize.errors import DataError
from lit_personalize.export.exporter import export
from lit_personalize.export.loading import read_adapter

Make = Callable[..., object]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_pack_get_and_pack_again(
    base: Base, make_weights: Make, finish: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every finished adapter is a row, and comes back as a file; what is packed is left out; labels may come later."""
    own = {f"c{i}": make_weights(i, alpha=2.0) for i in range(3)}
    for name, weights in list(own.items())[:2]:
        out = finish(name, weights)
    (out / "exports" / ".tmp-c9").mkdir()
    command = ["bank", "pack", str(out), "--base", str(base.source), "--json"]
    assert main(command) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["packed"], first["known"], first["rows"], first["gauge"]) == (2, 0, 2, "known")
    finish("c2", own["c2"], labels={"hat": 1})
    labels = tmp_path / "labels.csv"
    labels.write_text("id,hat,name\nc0,0,Ann\nc2,1,Bob\nc7,1,Eve\n")
    assert main([*command, "--labels", str(labels)]) == 0
    second = json.loads(capsys.readouterr().out)
    assert (second["packed"], second["known"], second["rows"]) == (1, 2, 3)
    assert second["labels"] == {"hat": 2, "name": 2} and second["unknown_ids"] == ["c7"]
    assert second["largest_error"] < 2**-11 and second["fingerprint"] != first["fingerprint"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["packed"] == 0
    corpus = Corpus.open(out / "corpus")
    assert corpus.ids == ["c0", "c1", "c2"] and corpus.init_seed == 0 and corpus.base_fingerprint == base.fingerprint
    line = corpus.line("c2")
    assert (line["seed"], line["loss"], line["steps"], line["recipe"]) == (7, 0.25, 3, "lora/tinyworld")
    torch.testing.assert_close(corpus.labels()["hat"], torch.tensor([0, torch.nan, 1]), equal_nan=True)

    get = ["bank", "get", "c1", "--corpus", str(out / "corpus"), "--out", str(tmp_path / "got"), "--json"]
    assert main([*get, "--formats", "diffusers", "kohya"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["largest_error"] <= 1e-6 and 0 < report["rounding_error"] < 2**-11
    assert len(report["adapters"]["c1"]) == 2
    for path in report["adapters"]["c1"]:
        found = read_adapter(Path(path), base)
        assert all(relative(found.delta(layer), own["c1"].delta(layer)) < 1e-3 for layer in own["c1"].layers())
    assert main(get) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["bank", "get", "c9", *get[3:]]) == 3
    assert "has no adapter 'c9'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("weights", "record", "why"),
    [
        ({}, {"base_fingerprint": "other"}, "adapter 'b' was trained on base other"),
        ({}, {"init_seed": 1}, "adapter 'b' began from initial seed 1, those in .* from 0"),
        ({}, {"init_seed": None}, "adapter 'b' does not say from which seed"),
        ({"rank": 2}, {}, "adapter 'b' has rank \\[2\\], not \\[1\\]"),
        ({"targets": "key_value"}, {}, "adapter 'b' changes .* layers"),
    ],
)
def test_what_does_not_belong_is_refused(
    base: Base, make_weights: Make, finish: Make, weights: dict[str, object], record: dict[str, object], why: str
) -> None:
    """By name, with the fix; what was packed stays."""
    out = finish("a", make_weights(0))
    before = pack(out, out / "corpus", base).fingerprint
    finish("b", make_weights(1, **weights), **record)
    with pytest.raises(DataError, match=why):
        pack(out, out / "corpus", base)
    assert Corpus.open(out / "corpus").fingerprint == before


def test_another_alpha_is_refused(base: Base, make_weights: Make, tmp_path: Path) -> None:
    """In files that state it; those of diffusers have it in B."""
    for name, alpha in (("a", 1.0), ("b", 4.0)):
        export(make_weights(0, alpha=alpha), tmp_path / "files" / name, base, name, ["kohya"])
    with pytest.raises(DataError, match="adapter 'b' has other alphas as in"):
        pack(tmp_path / "files", tmp_path / "c", base, gauge="unknown")


def test_adapters_that_began_differently_make_a_corpus_of_unknown_gauge(
    base: Base, make_weights: Make, finish: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(2):
        out = finish(f"c{seed}", make_weights(seed, seed), init_seed=seed)
    command = ["bank", "pack", str(out), "--base", str(base.source)]
    assert main([*command, "--gauge", "unknown"]) == 0
    corpus = Corpus.open(out / "corpus")
    assert corpus.gauge == "unknown" and corpus.init_seed is None
    assert corpus.index["init_seed"].to_pylist() == [0, 1]
    assert main([*command, "--gauge", "known"]) == 3
    assert "was made with gauge unknown" in capsys.readouterr().err
    assert main([*command, "--base", "tinyworld"]) == 3
    assert "name that base, or another corpus" in capsys.readouterr().err
    assert main(["bank", "get", "c0", "--corpus", str(out / "corpus"), "--base", "tinyworld"]) == 3
    assert "name theirs with --base" in capsys.readouterr().err


def test_labels_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "l.csv"
    for text, why in (
        ("id,a\nx,1\nx,2\n", "'x' stands twice"), ("id,a\nx,1,2\n", "line 2 has"), ("id,a\nx\n", "line 2 has"),
        ("", "have no line"), ("id,a\n", "have no line"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(DataError, match=why):
            read_labels(path)
    path.write_text("id,a,b,c\nx,1,yes,-1\ny,,no,nan\nz,blue,False,2.5\n")
    told = read_labels(path)
    assert told == {
        "x": {"a": 1.0, "b": True, "c": -1.0},
        "y": {"b": False},
        "z": {"a": "blue", "b": False, "c": 2.5},
    }
    with pytest.raises(DataError, match="do not exist"):
        read_labels(tmp_path / "none.csv")


def test_a_file_that_is_not_the_one_written(base: Base, make_weights: Make, finish: Make, tmp_path: Path) -> None:
    """Where the record has the files' sha256, another file is refused."""
    out = finish("a", make_weights(0), sha256={"pytorch_lora_weights.safetensors": "0" * 64})
    with pytest.raises(DataError, match="pytorch_lora_weights.safetensors is not the file that was written"):
        pack(out, tmp_path / "c", base)
