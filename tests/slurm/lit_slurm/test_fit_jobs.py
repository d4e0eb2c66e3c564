"""`litp slurm submit` on a real Slurm: two nodes, a notice in the middle, and the weights of an undisturbed run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lit_personalize import checkpoints
from lit_personalize.backbones.tiny import write_tiny_base
from lit_personalize.run_directory import RunDirectory
from lit_personalize.tinyworld.dataset import sample_pictures, write_folder

ROOT = Path(__file__).parents[3]
PATHS = os.pathsep.join(str(ROOT / holder) for holder in ("", "kernels", "datamodules", "callbacks", "slurm"))
STEPS = 40
WAIT = 280


def litp(*arguments: str) -> str:
    """Of a `litp` of its own, as on a login node."""
    command = [sys.executable, "-m", "lit_personalize", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": PATHS}, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def until(true: Callable[[], object], what: str, log: Path) -> None:
    end = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < end, f"no {what}:\n{log.read_text()[-3000:] if log.exists() else 'no log'}"
        time.sleep(0.2)


def waiting(job: str) -> str:
    return subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True).stdout.strip()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm_box: None) -> Path:
    """A folder with photos, the configuration of a run on two nodes, and a profile of this cluster."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    profile = {"partition": "low", "cpus": 1, "environment": {"PYTHONPATH": PATHS, "MASTER_ADDR": "127.0.0.1"}}
    (tmp_path / "config/litp/slurm").mkdir(parents=True)
    (tmp_path / "config/litp/slurm/box.yaml").write_text(yaml.safe_dump(profile))
    write_folder(sample_pictures(4, 1, kind="object"), tmp_path / "photos")
    run = {
        "slurm": {"nodes": 2, "time": "1:00:00", "restarts": 3},
        "model": {
            "class_path": "Denoising",
            "init_args": {"base": str(write_tiny_base(tmp_path / "base", "sd1")), "adapters": [{"class_path": "LoRA"}]},
        },
        "data": {
            "class_path": "PersonalizationData",
            "init_args": {"concepts": [{"path": "photos", "class_noun": "cat"}], "resolution": 32, "batch_size": 1},
        },
        "trainer": {"max_steps": STEPS, "accelerator": "cpu", "log_every_n_steps": 1, "enable_progress_bar": False},
        "checkpoint": {"every": 1000},
        "export": {"verify": False, "formats": ["diffusers"]},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    return tmp_path


def submit(name: str, *arguments: str) -> str:
    given = ["--profile", "box", "-c", "run.yaml", "--name", name, *arguments]
    return litp("slurm", "submit", *given).splitlines()[-1]


def weights(name: str) -> dict[str, torch.Tensor]:
    (file,) = Path("runs", name, "exports").glob("*.safetensors")
    return load_file(file)


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_a_preempted_run_goes_on_and_ends_with_the_same_weights(place: Path) -> None:
    straight = submit("straight")
    log = place / "runs/slurm/straight" / f"{straight}.log"
    until(lambda: not waiting(straight), "the end of the undisturbed run", log)
    assert RunDirectory("runs", "straight").newest_step() == STEPS, log.read_text()[-3000:]

    job = submit("stopped")
    log = place / "runs/slurm/stopped" / f"{job}.log"
    until(lambda: (place / "runs/stopped/metrics.csv").exists(), "a first step", log)
    assert "RUNNING" in litp("slurm", "status")
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    until(lambda: (place / "runs/stopped/preempt.log").exists(), "the save", log)
    (step, _), *_ = checkpoints.published(place / "runs/stopped/checkpoints")
    assert 0 < step < STEPS
    until(lambda: not waiting(job), "the end of the run", log)
    told = log.read_text()
    assert "Exited with exit code 75" in told and f"resumed at step {step} of {STEPS}" in told
    assert ": queued again, restart 1 of at most 3" in told  # by 75, or by what Slurm ended a slower rank with
    assert f"USR2 step={step} job_id={job}" in (place / "runs/stopped/preempt.log").read_text()
    first, second = weights("straight"), weights("stopped")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert "ended" in litp("slurm", "status")
