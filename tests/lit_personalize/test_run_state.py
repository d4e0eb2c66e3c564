"""What a run directory says of its run, whatever ended it."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path

import pytest

from lit_personalize import checkpoints
from lit_personalize.cli.main import main
from lit_personalize.errors import DataError
from lit_personalize.run_directory import RunDirectory
from lit_personalize.run_state import curves_of, find_runs, state_of


def made(root: Path, name: str, step: int = 0, steps: int = 10, loss: float = 0.5) -> RunDirectory:
    """A run directory as training leaves it."""
    run = RunDirectory(root, name).create()
    run.write_text("config.yaml", f"name: {name}\ntrainer: {{max_steps: {steps}}}\n")
    run.write_text("metrics.csv", f"epoch,loss,step\n0,{2 * loss},0\n0,{loss},1\n0,,1\n0,0.0")
    run.lock().unlock()
    if step:
        checkpoints.publish(run.checkpoints, step, lambda folder: folder.joinpath("state.ckpt").write_bytes(b"x" * 9))
    return run


def test_every_end_has_its_state(tmp_path: Path) -> None:
    finished, again = made(tmp_path, "finished", 10), made(tmp_path, "again", 10)
    for run in (finished, again):
        run.mark_finished(run.config.read_text())
    again.write_text("config.yaml", "trainer: {max_steps: 20}\n")  # more steps are asked for since
    running, killed = made(tmp_path, "running", 4), made(tmp_path, "killed", 4)
    killed.lock_file.write_text('{"pid": 1, "host": "node-7", "start": "then"}\n')  # and nobody holds it
    preempted, moved_on = made(tmp_path, "preempted", 4), made(tmp_path, "moved-on", 40)
    for run in (preempted, moved_on):
        run.note_preemption("USR2 step=4")
    made(tmp_path, "failed")
    RunDirectory(tmp_path, "unread").create().lock().unlock()  # its data was refused before training
    with running.lock():
        found = {run.name: state_of(run).state for run in find_runs([], tmp_path)}
    assert found == {
        "again": "stopped", "failed": "failed", "finished": "finished", "killed": "killed", "moved-on": "stopped",
        "preempted": "preempted", "running": "running", "unread": "failed",
    }  # fmt: skip
    assert state_of(running).state == "stopped"


def test_asking_who_owns_a_run_does_not_keep_its_owner_out(tmp_path: Path) -> None:
    """`is_held` has the lock for an instant, in which the run may be started again."""
    run = made(tmp_path, "cat", 4)
    asking = os.open(run.lock_file, os.O_RDONLY)
    fcntl.flock(asking, fcntl.LOCK_SH)
    instant = threading.Timer(0.01, os.close, [asking])
    instant.start()
    with RunDirectory(tmp_path, "cat"):
        assert run.is_held() and run.is_held(), "and it is asked without taking it away"
    instant.join()


def test_figures_and_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "73")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "71")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    run = made(tmp_path, "cat", 4)
    run.write_env()
    (run.exports / "cat.safetensors").write_bytes(b"x")
    state = state_of(run)
    assert (state.step, state.steps, state.loss, state.job, state.exports) == (4, 10, 0.5, "71_3", ["cat.safetensors"])
    assert state.checkpoint == str(run.checkpoints / "step-00000004")
    assert state.bytes == sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    assert curves_of(run.metrics) == {"loss": [(1, 1.0), (2, 0.5)]}, "the line that a kill cut short is left out"


def test_runs_are_found_by_name_pattern_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("s-16", "s-4", "cat"):
        made(tmp_path / "runs", name)
    (tmp_path / "runs/slurm/s").mkdir(parents=True)

    def names(*places: str, root: str = "runs") -> list[str]:
        return [run.name for run in find_runs(places, root)]

    assert names() == names("runs") == ["cat", "s-4", "s-16"]
    assert names("s-*") == ["s-4", "s-16"] and names("s-*", "runs/cat", "s-4") == ["s-4", "s-16", "cat"]
    assert names("cat") == names("runs/cat") == ["cat"]
    monkeypatch.chdir(tmp_path / "runs/cat")
    assert names(".", root="gone") == ["cat"]
    with pytest.raises(DataError, match="there is no run 'dog' in .*runs"):
        names("dog", root=str(tmp_path / "runs"))
    with pytest.raises(DataError, match="slurm holds no run"):
        names(str(tmp_path / "runs/slurm"))


def test_ls_and_show_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(tmp_path, "cat", 4, loss=0.25)
    made(tmp_path, "dog")
    assert main(["runs", "ls", "--root", str(tmp_path), "c*"]) == 0
    _, line = capsys.readouterr().out.splitlines()
    assert line.split()[:4] == ["cat", "stopped", "4/10", "0.25"]
    assert main(["runs", "ls", str(tmp_path), "--json"]) == 0
    assert [row["state"] for row in json.loads(capsys.readouterr().out)["runs"]] == ["stopped", "failed"]
    assert main(["runs", "show", "cat", "--root", str(tmp_path)]) == 0
    assert "step               4 of 10" in capsys.readouterr().out
    (run.checkpoints / "step-00000004/state.ckpt").write_bytes(b"y" * 9)
    assert main(["runs", "show", str(run.path)]) == 0
    assert "newest whole checkpoint  step 0: later ones do not hold their hashes" in capsys.readouterr().out
    assert main(["runs", "show", str(run.path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["step"] == 0 and report["state"] == "stopped" and "files" in report
    run.write_text("config.yaml", "a: [")
    assert main(["runs", "ls", str(tmp_path)]) == 3
    assert "config.yaml is not YAML" in capsys.readouterr().err
