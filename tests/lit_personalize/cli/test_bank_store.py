"""`litp bank run`, `pack`, `get`: pictures become adapters, rows, and adapters again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lit_personalize.backbones.loading import load_base
from lit_personalize.cli.main import main
from lit_personalize.corpus.store import Corpus
from lit_personalize.export.loading import read_adapter
from lit_personalize.tinyworld.dataset import sample_pictures, write_folder


def test_run_pack_get(tiny_bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Base and recipe are the run's; the row is the adapter that was trained, but for rounding."""
    for number in range(2):
        write_folder(sample_pictures(1, number, kind="critter"), tmp_path / "people" / f"c{number}")
    out, corpus = tmp_path / "out", tmp_path / "out" / "corpus"
    base = ["--model.init_args.base", str(tiny_bases["sd1"]), "--data.init_args.resolution", "32"]
    command = ["bank", "run", str(tmp_path / "people"), "--out", str(out), "--slots", "2", "--verify", "none", "--json"]
    assert main([*command, *base, "--trainer.max_steps", "2", "--data.init_args.batch_size", "1"]) == 0
    capsys.readouterr()
    assert main(["bank", "pack", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["gauge"]) == (2, "known")
    line = Corpus.open(corpus).line("c1")
    record = json.loads((out / "exports" / "c1" / "adapter.json").read_text())
    assert line["loss"] == record["loss"] and line["seed"] == record["seed"] and line["init_seed"] == 0
    assert line["recipe"].startswith("lora@") and line["base_fingerprint"] == record["base_fingerprint"]
    assert main(["bank", "get", "c1", "--corpus", str(corpus), "--out", str(tmp_path / "got"), "--json"]) == 0
    (path,) = json.loads(capsys.readouterr().out)["adapters"]["c1"]
    built = load_base(tiny_bases["sd1"])
    found, trained = (read_adapter(Path(p), built) for p in (path, out / "exports" / "c1"))
    for layer in trained.layers():
        torch.testing.assert_close(
            found.delta(layer), trained.delta(layer), rtol=0, atol=1e-3 * trained.delta(layer).norm().item()
        )
