"""`litp verify` and `litp inspect` on files of other people: what they report, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lit_personalize.adapters.lora import LoRA
from lit_personalize.backbones.loading import load_base
from lit_personalize.cli.main import main


@pytest.fixture
def theirs(tiny_bases: dict[str, Path], tmp_path: Path) -> tuple[list[str], Path, dict[str, torch.Tensor]]:
    """A LoRA in diffusers' layout without any metadata."""
    base = load_base(tiny_bases["sd1"])
    adapter = LoRA(rank=2, targets="key_value")
    adapter.attach(base)
    tensors = {}
    for layer, factors in adapter.export_weights().low_rank.items():
        tensors[f"{layer}.lora_A.weight"] = factors.down
        tensors[f"{layer}.lora_B.weight"] = torch.full_like(factors.up, 0.1)
    file = tmp_path / "files" / "theirs.safetensors"
    file.parent.mkdir()
    save_file(tensors, file)
    return ["--base", str(tiny_bases["sd1"])], file, tensors


def test_ranks_scales_and_coverage_are_reported(
    theirs: tuple[list[str], Path, dict[str, torch.Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    base, file, tensors = theirs
    assert main(["verify", str(file.parent), *base, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    layers = len(tensors) // 2
    assert (
        report["files"][0] | {"file": "theirs.safetensors", "layers": layers, "ranks": {"2": layers}}
        == report["files"][0]
    )
    assert report["files"][0]["coverage"] == f"{layers}/{4 * layers}"
    assert main(["verify", str(file), *base]) == 0
    assert f"ranks {{'2': {layers}}}" in capsys.readouterr().out
    assert main(["inspect", str(file)]) == 0
    assert "diffusers LoRA" in capsys.readouterr().out


def test_a_file_that_the_client_refuses_or_that_is_none_has_its_exit_code(
    theirs: tuple[list[str], Path, dict[str, torch.Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    base, file, tensors = theirs
    old = {k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): t for k, t in tensors.items()}
    alphas = {k.replace("lora.down.weight", "alpha"): torch.tensor(1.0) for k in old if "lora.down" in k}
    save_file({**old, **alphas}, file)  # the stock loader wants `lora` in every key
    assert main(["verify", str(file), *base]) == 4
    assert "stock client does not load it" in capsys.readouterr().err
    save_file({k: t for k, t in tensors.items() if "lora_A" in k}, file)
    assert main(["verify", str(file), *base]) == 3
    assert "lacks its up factor" in capsys.readouterr().err
    file.unlink()
    assert main(["verify", str(file.parent), *base]) == 3
    assert "holds no adapter file" in capsys.readouterr().err
    torch.save(tensors, file.with_suffix(".pt"))
    assert main(["verify", str(file.parent), *base]) == 3
    assert "is a pickle" in capsys.readouterr().err
