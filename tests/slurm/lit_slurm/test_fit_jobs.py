"""`litp slurm submit` on a real Slurm: two nodes, a notice in the middle, and the weights of an undisturbed run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from box_runs import STEPS, litp, same, submit, until, waiting, weights, write_place

from lit_personalize import checkpoints
from lit_personalize.run_directory import RunDirectory


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm_box: Path) -> Path:
    """A folder with photos, the configuration of a run on two nodes, and a profile of this cluster."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return write_place(tmp_path, nodes=2, restarts=3)


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
    assert same(weights("straight"), weights("stopped"))
    assert "ended" in litp("slurm", "status")
