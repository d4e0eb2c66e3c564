"""Every method on every family: fit, resume, export and verify; one step and one more are two steps, bit for bit."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_personalize.cli.main import main

METHODS = ("textual_inversion", "dreambooth_lora", "custom_diffusion", "lora")
NEWER = ("dreambooth", "oft")
"""On two families only: each case takes seconds."""
FORMATS = {
    "custom_diffusion": "[diffusers, kohya, delta]",
    "custom_diffusion_faces": "[diffusers, kohya, delta]",
    "dreambooth": "[diffusers, delta]",
    "oft": "[diffusers, peft]",
    "cones": "[diffusers, neurons]",
}
FAMILIES = ("sd1", "sd2", "sd2-v", "sdxl")
CASES = [
    *itertools.product(METHODS, FAMILIES),
    *itertools.product(NEWER, ("sd1", "sdxl")),
    ("cones", "sd1"),
    ("custom_diffusion_faces", "sd1"),
    ("b_lora", "sdxl"),
]
OPTIONS = {
    "lora": "[{class_path: LoRA, init_args: {rank: 2, use_dora: true, lr_ratio: 4, block_lr: {mid_block.*: 1e-5}}}]"
}
"""What `lora` trains on SDXL: every option that adds factors or parameter groups."""


def exported(root: Path) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors of all files that a run exported."""
    folder = root / "run" / "exports"
    return {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.parametrize(("method", "family"), CASES)
def test_resumed_is_undisturbed_in_every_exported_tensor(
    tiny_bases: dict[str, Path], workplace: Path, method: str, family: str
) -> None:
    given = ["--images", "photos", "--class-noun", "cat", "--method", method, "--base", str(tiny_bases[family])]
    assert main(["init", *given, "--regularization", "reg/00000.tar", "--name", "run"]) == 0
    formats = FORMATS.get(method, "[diffusers, kohya]")
    fit = [
        "fit", "-c", "run.yaml", "--data.init_args.resolution", "32", "--data.init_args.batch_size", "1",
        "--trainer.accumulate_grad_batches", "1", "--model.init_args.dtype", "float32", "--export.formats", formats,
        "--sampling.every", "100", "--sampling.prompts", "[]", "--sampling.steps", "1", "--checkpoint.every", "1",
    ]  # fmt: skip
    if family == "sdxl" and method in OPTIONS:
        fit += ["--model.init_args.adapters", OPTIONS[method]]
    unverified = ["--export.verify", "false"]
    assert main([*fit, "--root", "straight", "--trainer.max_steps", "2", *unverified]) == 0
    assert main([*fit, "--root", "parted", "--trainer.max_steps", "1", *unverified]) == 0
    first = exported(Path("parted"))
    assert main([*fit, "--root", "parted", "--trainer.max_steps", "2"]) == 0

    straight, parted = exported(Path("straight")), exported(Path("parted"))
    assert straight and straight.keys() == parted.keys() == first.keys()
    for name, tensors in straight.items():
        assert tensors.keys() == parted[name].keys(), name
        differing = [key for key, tensor in tensors.items() if not tensor.equal(parted[name][key])]
        assert not differing, f"{name}: {differing}"
        assert any(not tensor.equal(first[name][key]) for key, tensor in tensors.items()), f"{name}: nothing trained"
    report = json.loads(Path("parted/run/exports/verify.json").read_text())
    assert report["files"] and report["picture_difference"] <= 1 / 255 + 1e-6
