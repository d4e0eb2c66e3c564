"""Every strategy trains what DDP trains, goes on from its own checkpoints, and exports the same files: two real ranks.

A CPU functional test of sharding and of checkpoints; FSDP and DeepSpeed run through subclasses for tests
(`cpu_strategies.py`). It says nothing about NCCL, memory or speed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.strategies import DeepSpeedStrategy
from safetensors.torch import load_file

from lit_personalize import checkpoints, sharded_state
from lit_personalize.adapters.key_value_delta import KeyValueDelta
from lit_personalize.backbones.tiny import write_tiny_base
from lit_personalize.errors import UsageError
from lit_personalize.fitting import refuse_other_layout
from lit_personalize.objectives.denoising import Denoising
from lit_personalize.tinyworld.dataset import sample_pictures, write_folder

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
PATHS = os.pathsep.join(str(ROOT / holder) for holder in ("", "kernels", "datamodules", "callbacks", "slurm"))
STEPS, SAVED = 4, 2
FULL: dict[str, Any] = {"class_path": "FullWeights"}
KEY_VALUE: dict[str, Any] = {"class_path": "KeyValueDelta"}
TOKEN = {"class_path": "TokenEmbedding", "init_args": {"token": "<new1>", "init": "cat"}}
LORA = {"class_path": "LoRA", "init_args": {"text_encoder": True, "rank": 1}}
ADAPTERS = {"kv": [KEY_VALUE, TOKEN], "full": [FULL], "lora": [LORA]}


def fsdp2(ranks: int = 2, name: str = "lightning.pytorch.strategies.ModelParallelStrategy") -> str:
    options = {"data_parallel_size": ranks, "tensor_parallel_size": 1}
    return json.dumps({"class_path": name, "init_args": options})


FSDP = json.dumps({"class_path": "cpu_strategies.CpuFSDP", "init_args": {"state_dict_type": "sharded"}})
EARLIER_FSDP2, EARLIER_FSDP = fsdp2(name="cpu_strategies.EarlierFSDP2"), FSDP.replace("CpuFSDP", "EarlierFSDP")


def zero(stage: int, **options: Any) -> str:
    given = {"stage": stage, "exclude_frozen_parameters": True, **options}
    return json.dumps({"class_path": "cpu_strategies.CpuDeepSpeed", "init_args": given})


def fit(name: str, strategy: str, *more: str, steps: int = STEPS, ranks: int = 2) -> list[str]:
    """Arguments of `litp fit` for the run `name`, whose first word says what trains."""
    place = ["-c", f"{name.partition('-')[0]}.yaml", "--name", name]
    how = ["--trainer.strategy", strategy, "--trainer.devices", str(ranks), "--trainer.max_steps", str(steps)]
    return [*place, *how, *more]


def in_halves(name: str, strategy: str, *more: str) -> list[list[str]]:
    return [fit(name, strategy, *more, steps=SAVED), fit(name, strategy, *more)]


BF16 = ("--model.init_args.dtype", "bfloat16")
PICTURES = ("--sampling.prompts", '["a cat"]', "--sampling.every", "2", "--sampling.steps", "2")
STOCK = [
    fit("kv-ddp", "ddp"), fit("kv-fsdp2", fsdp2(), *PICTURES), *in_halves("kv-fsdp2-halves", fsdp2()),
    fit("kv-fsdp", FSDP, *PICTURES), *in_halves("kv-fsdp-halves", FSDP),
    fit("full-ddp", "ddp"), fit("full-fsdp2", fsdp2()), fit("full-fsdp", FSDP), fit("full-fsdp2-bf16", fsdp2(), *BF16),
    fit("lora-ddp", "ddp"), fit("lora-fsdp2", fsdp2()), *in_halves("lora-fsdp2-halves", fsdp2()),
    fit("kv-fsdp2-earlier", EARLIER_FSDP2, steps=SAVED), fit("kv-fsdp2-earlier", fsdp2()),
    fit("kv-fsdp-earlier", EARLIER_FSDP, steps=SAVED), fit("kv-fsdp-earlier", FSDP),
    fit("kv-fsdp2-halves", "ddp", steps=STEPS + 1), fit("lora-fsdp", FSDP), fit("kv-averaged", fsdp2(), "--ema", "0.9"),
]  # fmt: skip
DEEPSPEED = [
    fit("kv-ddp", "ddp"), fit("kv-zero1", zero(1)), *in_halves("kv-zero2-halves", zero(2)),
    *in_halves("kv-zero3-halves", zero(3), *PICTURES), fit("kv-offload", zero(3, offload_optimizer=True)),
    fit("full-ddp", "ddp"), fit("full-zero3", zero(3)), fit("full-zero3-bf16", zero(3), *BF16),
    fit("lora-ddp", "ddp"), fit("lora-zero2", zero(2)),
    fit("kv-corrected", zero(2), "--model.init_args.adapters",
        json.dumps([{**TOKEN, "init_args": {**TOKEN["init_args"], "norm": "initial"}}])),
]  # fmt: skip


def prepare(folder: Path) -> Path:
    """Four photos, a tiny SDXL, and a configuration for each set of adapters."""
    write_folder(sample_pictures(4, 1, kind="object"), folder / "photos")
    for caption in (folder / "photos").glob("*.txt"):
        caption.unlink()
    base = write_tiny_base(folder / "base", "sdxl")
    for name, adapters in ADAPTERS.items():
        concept = {"path": "photos", "class_noun": "cat", "token": "<new1>" if name == "kv" else None}
        adam = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
        model = {"base": str(base), "adapters": adapters, "optimizer": adam, "gradient_checkpointing": name == "full"}
        data = {"concepts": [concept], "resolution": 32, "batch_size": 1}
        run = {
            "model": {"class_path": "Denoising", "init_args": model},
            "data": {"class_path": "PersonalizationData", "init_args": data},
            "trainer": {"accelerator": "cpu", "log_every_n_steps": 1, "enable_progress_bar": False,
                        "gradient_clip_val": 0.5},
            "checkpoint": {"every": SAVED},
            "export": {"verify": False, "formats": ["diffusers"] if name == "lora" else ["delta"]},
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(run))
    return folder


def launch(folder: Path, fits: list[list[str]]) -> None:
    (folder / "fits.json").write_text(json.dumps(fits))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(HERE / "rank.py")]
    variables = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    variables["LITP_ALLOW"] = "cpu_strategies"
    command = [sys.executable, *command, "fits.json"]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepare(tmp_path_factory.mktemp("stock"))
    launch(folder, STOCK)
    return folder


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed")
    folder = prepare(tmp_path_factory.mktemp("deepspeed"))
    launch(folder, DEEPSPEED)
    return folder


def exported(folder: Path, name: str) -> dict[str, torch.Tensor]:
    files = (folder / "runs" / name / "exports").glob("*.safetensors")
    return {key: value.float() for file in sorted(files) for key, value in load_file(file).items()}


def compare(folder: Path, name: str) -> None:
    """Exports against those of DDP: the norm of the difference over that of the change."""
    first, other = exported(folder, f"{name.partition('-')[0]}-ddp"), exported(folder, name)
    assert first.keys() == other.keys() and first
    changed = torch.stack([value.norm() for value in first.values()]).norm()
    off = torch.stack([(first[key] - other[key]).norm() for key in first]).norm()
    assert changed > 1e-3, "something was trained"
    # Adam makes full steps of the smallest gradients, so rounding weighs more with a base in bf16.
    assert off <= (0.3 if name.endswith("bf16") else 1e-4) * changed, f"{name}: {off} of {changed}"


def check_size(folder: Path, name: str) -> None:
    """At most four times what trains (itself, two moments, and a copy), and 256 KiB."""
    found = checkpoints.find_complete(folder / "runs" / name / "checkpoints")
    assert found is not None and not found.skipped
    trained = [tensor.nbytes for tensor in checkpoints.load_state(found.path).values()]
    assert checkpoints.size_of(found.path) <= 4 * sum(trained) + 2**18


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [
    "kv-fsdp2", "kv-fsdp2-halves", "kv-fsdp", "kv-fsdp-halves", "full-fsdp2", "full-fsdp", "full-fsdp2-bf16",
    "lora-fsdp2", "lora-fsdp2-halves",
])  # fmt: skip
def test_exports_are_those_of_ddp(stock: Path, name: str) -> None:
    compare(stock, name)
    check_size(stock, name)


def same(folder: Path, name: str, other: str) -> bool:
    """Whether two runs exported the same, to the bit."""
    first, second = exported(folder, name), exported(folder, other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["kv-fsdp2", "kv-fsdp", "lora-fsdp2"])
def test_a_run_in_halves_is_the_whole_run(stock: Path, name: str) -> None:
    assert same(stock, name, f"{name}-halves")


@pytest.mark.parametrize("name", ["kv-fsdp2", "kv-fsdp"])
def test_a_run_goes_on_from_a_checkpoint_without_whole_states_in_its_header(stock: Path, name: str) -> None:
    folder = stock / "runs" / f"{name}-earlier/checkpoints"
    before, after = (
        sharded_state.read_header(checkpoints.directory(folder, step) / "state.ckpt") for step in (SAVED, STEPS)
    )
    assert "whole" not in before and "whole" in after
    assert len(checkpoints.load_state(checkpoints.directory(folder, SAVED))) == len(exported(stock, name))
    assert same(stock, name, f"{name}-earlier")


def test_all_ranks_draw_the_samples_of_a_sharded_run(stock: Path) -> None:
    for name in ("kv-fsdp2", "kv-fsdp"):
        assert len(list((stock / "runs" / name / "samples").glob("step-*/*.png"))) == 3 * 2  # steps 0, 2, 4; two seeds


def test_what_a_strategy_cannot_do_is_refused(stock: Path) -> None:
    assert (stock / "kv-fsdp2-halves.refused").read_text() == (
        "checkpoint step-00000004 has a distributed state, and DDPStrategy reads a whole one: go on with the strategy "
        "that wrote it, or take a new run name"
    )
    assert "FSDPStrategy: lora is too small to be shared out; use ddp" in (stock / "lora-fsdp.refused").read_text()
    assert "ema: ModelParallelStrategy keeps shares" in (stock / "kv-averaged.refused").read_text()
    assert len(list(stock.glob("*.refused"))) == 3


@pytest.mark.timeout(300)
def test_a_sharded_checkpoint_goes_on_with_another_number_of_ranks(stock: Path) -> None:
    shutil.copytree(stock / "runs/kv-fsdp2-halves", stock / "runs/kv-alone")
    for path in [stock / "runs/kv-alone/checkpoints/step-00000004", stock / "runs/kv-alone/exports"]:
        shutil.rmtree(path)
    alone = fit("kv-alone", fsdp2(1), "--data.init_args.elastic", "true", ranks=1)
    command = [sys.executable, "-m", "lit_personalize", "fit", *alone]
    done = subprocess.run(command, cwd=stock, env={**os.environ, "PYTHONPATH": PATHS}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resumed at step {SAVED} of {STEPS}" in done.stderr
    before = checkpoints.directory(stock / "runs/kv-alone/checkpoints", SAVED)
    found = checkpoints.find_complete(stock / "runs/kv-alone/checkpoints")
    assert found is not None and found.step == STEPS
    first, last = checkpoints.load_state(before), checkpoints.load_state(found.path)
    assert first.keys() == last.keys() and all(0 < float((last[k] - first[k]).abs().max()) < 0.01 for k in first)


@pytest.mark.deepspeed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [
    "kv-zero1", "kv-zero2-halves", "kv-zero3-halves", "kv-offload", "full-zero3", "full-zero3-bf16",
    "lora-zero2",
])  # fmt: skip
def test_exports_of_deepspeed_are_those_of_ddp(deepspeed: Path, name: str) -> None:
    compare(deepspeed, name)
    check_size(deepspeed, name)


@pytest.mark.deepspeed
def test_shares_of_deepspeed_keep_their_number_of_ranks(deepspeed: Path) -> None:
    found = checkpoints.find_complete(deepspeed / "runs/kv-zero2-halves/checkpoints")
    assert found is not None
    objective = Denoising(str(deepspeed / "base"), [KeyValueDelta()])
    with pytest.raises(UsageError, match="shares of 2 ranks, which 4 cannot read: go on with 2, or use ModelParallel"):
        refuse_other_layout(found, objective, DeepSpeedStrategy(), ranks=4)


@pytest.mark.deepspeed
def test_rows_that_are_put_right_after_each_step_are_refused(deepspeed: Path) -> None:
    said = (deepspeed / "kv-corrected.refused").read_text()
    assert said == "token:<new1> puts itself right after each step, which DeepSpeed would undo; use ddp"
