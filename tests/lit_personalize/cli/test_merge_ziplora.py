"""`litp merge ziplora` from two finished LoRAs to one verified file, and on again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_personalize.adapters.lora import LoRA
from lit_personalize.backbones.loading import load_base
from lit_personalize.cli.main import main
from lit_personalize.export.exporter import export
from lit_personalize.tinyworld.dataset import sample_pictures, write_folder


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_two_loras_become_one(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for seed, (part, rank) in enumerate((("content", 3), ("style", 2))):
        base, adapter = load_base(tiny_bases[family]), LoRA(rank=rank)
        adapter.attach(base, seed)
        with torch.no_grad():
            for factor in adapter.factors.values():
                factor.add_(0.1)
        export(adapter.export_weights(), tmp_path / part, base, part, ["diffusers"])
        write_folder(sample_pictures(2, seed), tmp_path / f"{part}-pictures")
    command = [
        "merge", "ziplora", "--base", str(tiny_bases[family]), "--content", "content", "--style", "style",
        "--content-images", "content-pictures", "--style-images", "style-pictures", "--json",
        "--content-prompt", "photo of a cat", "--style-prompt", "toy in red: a style",
    ]  # fmt: skip
    quick = ["--data.init_args.resolution", "32", "--model.init_args.dtype", "float32", "--sampling.steps", "1"]
    assert main([*command, *quick, "--trainer.max_steps", "1"]) == 0
    first = load_file("runs/zipped/exports/pytorch_lora_weights.safetensors")
    capsys.readouterr()
    assert main([*command, *quick, "--trainer.max_steps", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["step"] == 2 and json.loads(Path("runs/zipped/exports/verify.json").read_text())["files"]
    merged = load_file("runs/zipped/exports/pytorch_lora_weights.safetensors")
    downs = [tensor for name, tensor in merged.items() if "lora_A" in name]
    assert {len(tensor) for tensor in downs} == {5} and any(not t.equal(first[n]) for n, t in merged.items())

    assert main([*command[:-1], "another prompt", *quick]) == 2
    assert "zipped.yaml is of another merge or was changed" in capsys.readouterr().err
    assert main([*command[:-4], "--content-prompt", "x", "--style-prompt", "y", "--style-images", "none"]) == 3
    assert "folder none does not exist" in capsys.readouterr().err
    assert main([*command, "--name", "other", "--trainer.max_stepz", "1"]) == 2
    assert "did you mean" in capsys.readouterr().err
