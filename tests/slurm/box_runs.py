"""Runs on the Slurm of these tests: their folder and configuration, `litp slurm submit`, and waiting for an event."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from lit_personalize.backbones.tiny import write_tiny_base
from lit_personalize.tinyworld.dataset import sample_pictures, write_folder

ROOT = Path(__file__).parents[2]
HOLDERS = ("", "kernels", "datamodules", "callbacks", "slurm", "tests/slurm")
PATHS = os.pathsep.join(str(ROOT / holder) for holder in HOLDERS)
STEPS = 40
WAIT = 280


def litp(*arguments: str) -> str:
    """Of a `litp` of its own, as on a login node."""
    command = [sys.executable, "-m", "lit_personalize", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": PATHS}, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def until(true: Callable[[], object], what: str, log: Path, wait: float = WAIT) -> None:
    end = time.monotonic() + wait
    while not true():
        assert time.monotonic() < end, f"no {what}:\n{log.read_text()[-3000:] if log.exists() else 'no log'}"
        time.sleep(0.2)


def waiting(job: str) -> str:
    """States of a job, or of the tasks of an array, that has not ended."""
    return subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True).stdout.strip()


def write_place(folder: Path, **slurm: Any) -> Path:
    """Photos, the configuration of a run, and a profile of this cluster in `folder/config`, for XDG_CONFIG_HOME."""
    # With other threads sums have another order, and weights other bits.
    variables = {"PYTHONPATH": PATHS, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "LITP_ALLOW": "hold_at"}
    profile = {"partition": "low", "cpus": 1, "environment": variables}
    (folder / "config/litp/slurm").mkdir(parents=True)
    (folder / "config/litp/slurm/box.yaml").write_text(yaml.safe_dump(profile))
    write_folder(sample_pictures(4, 1, kind="object"), folder / "photos")
    run = {
        "slurm": {"time": "1:00:00", **slurm},
        "model": {
            "class_path": "Denoising",
            "init_args": {"base": str(write_tiny_base(folder / "base", "sd1")), "adapters": [{"class_path": "LoRA"}]},
        },
        "data": {
            "class_path": "PersonalizationData",
            "init_args": {"concepts": [{"path": "photos", "class_noun": "cat"}], "resolution": 32, "batch_size": 1},
        },
        "trainer": {"max_steps": STEPS, "accelerator": "cpu", "log_every_n_steps": 1, "enable_progress_bar": False},
        "checkpoint": {"every": 1000},
        "export": {"verify": False, "formats": ["diffusers"]},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


def submit(name: str, *arguments: str) -> str:
    given = ["--profile", "box", "-c", "run.yaml", "--name", name, *arguments]
    return litp("slurm", "submit", *given).splitlines()[-1]


def weights(name: str) -> dict[str, torch.Tensor]:
    (file,) = Path("runs", name, "exports").glob("*.safetensors")
    return load_file(file)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
