"""`litp bank run` on folders of pictures: adapters, one for each; the same command continues."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lit_personalize import checkpoints
from lit_personalize.bank.engine import Bank
from lit_personalize.cli.main import main
from lit_personalize.tinyworld.dataset import sample_pictures, write_folder


@pytest.fixture
def people(tmp_path: Path) -> Path:
    for number in range(3):
        write_folder(sample_pictures(2, number, kind="critter"), tmp_path / "people" / f"c{number}")
    (tmp_path / "people" / "c1" / "00000.png").write_bytes(b"no picture")
    return tmp_path / "people"


def test_run_is_stopped_and_continues(
    people: Path, tiny_bases: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A damaged folder fails by itself; a notice saves and ends with 75; then the same files as undisturbed."""
    command = ["bank", "run", str(people), "--slots", "1", "--json", "--model.init_args.base", str(tiny_bases["sd1"])]
    command += ["--data.init_args.resolution", "32", "--trainer.max_steps", "3", "--data.init_args.batch_size", "1"]
    assert main([*command, "--out", str(tmp_path / "whole"), "--verify", "none"]) == 3
    whole = json.loads(capsys.readouterr().out)
    assert sorted(whole["adapters"]) == ["c0", "c2"] and whole["steps"] == 6
    assert list(whole["failed"]) == ["c1"] and "00000.png" in whole["failed"]["c1"]

    original = Bank.step

    def step(bank: Bank) -> dict[int, str]:
        if bank.steps == 4:
            signal.raise_signal(signal.SIGUSR2)
        return original(bank)

    monkeypatch.setattr(Bank, "step", step)
    out = tmp_path / "stopped"
    assert main([*command, "--out", str(out)]) == 75
    assert "SIGUSR2: saved at step 5; the same command continues" in capsys.readouterr().err
    found = checkpoints.find_complete(out / "workers" / "0" / "checkpoints")
    assert found is not None and found.step == 5
    monkeypatch.setattr(Bank, "step", original)
    assert main([*command, "--out", str(out)]) == 3
    continued = json.loads(capsys.readouterr().out)
    assert (continued["known"], continued["done"], continued["steps"]) == (1, 2, 6)
    for name, place in whole["adapters"].items():
        file = "pytorch_lora_weights.safetensors"
        a, b = (load_file(Path(folder) / file) for folder in (place, continued["adapters"][name]))
        assert all((a[key] == b[key]).all() for key in a.keys() | b.keys())
    assert main([*command, "--out", str(out), "--init-seed", "1"]) == 2
    assert "was begun with other options" in capsys.readouterr().err


def test_refusals(people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert main(["bank", "run", str(tmp_path / "none"), *out]) == 3
    assert "holds no folder of pictures" in capsys.readouterr().err
    assert main(["bank", "run", str(people), *out, "--ema", "0.99"]) == 2
    assert "ema is set, and a bank has no moving average: leave it out" in capsys.readouterr().err
    assert main(["bank", "run", str(people), *out, "-c", "dreambooth_lora/tinyworld"]) == 2
    assert "is a convolution; set targets" in capsys.readouterr().err
