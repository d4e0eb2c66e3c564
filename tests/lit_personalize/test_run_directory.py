"""One owner at a time, known by name, and gone with its process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_personalize import atomic
from lit_personalize.errors import RunLockedError, UsageError
from lit_personalize.run_directory import RunDirectory

OWNER = """
import os, sys, time
from lit_personalize.run_directory import RunDirectory
run = RunDirectory(sys.argv[1], "cat").lock()
if os.fork() == 0:          # a loader worker that outlives its parent
    os.close(1)
    time.sleep(20)
    os._exit(0)
print("locked", flush=True)
time.sleep(60)
"""


def test_second_process_is_refused_and_told_the_owner(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    assert owner.stdout is not None and owner.stdout.readline() == "locked\n"
    try:
        with pytest.raises(RunLockedError, match=rf"owned by process {owner.pid} on .*, started 20.*another run name"):
            RunDirectory(tmp_path, "cat").lock()
        RunDirectory(tmp_path, "dog").lock().unlock()
        owner.kill()
        owner.wait(10)
        _lock_soon(tmp_path)  # although its forked child still lives
    finally:
        os.killpg(owner.pid, signal.SIGKILL)
        owner.stdout.close()


def _lock_soon(root: Path, seconds: float = 10) -> None:
    """Lock and unlock; a child that was forked just now gives its copy of the lock back at its first instruction."""
    end = time.monotonic() + seconds
    while True:
        try:
            RunDirectory(root, "cat").lock().unlock()
            return
        except RunLockedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def test_lock_is_exclusive_within_a_process_too(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, "cat") as run:
        assert run.lock() is run
        with pytest.raises(RunLockedError, match=f"process {os.getpid()} on"):
            RunDirectory(tmp_path, "cat").lock()
    RunDirectory(tmp_path, "cat").lock().unlock()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "a\nb"])
def test_name_must_be_one_component(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="run name"):
        RunDirectory(tmp_path, name)


def test_place_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cat").write_text("")
    with pytest.raises(UsageError, match="cannot make the run directory"):
        RunDirectory(tmp_path, "cat").create()


def test_records(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, "cat").create()
    run.write_command(["litp", "fit", "--data", "my cat"])
    run.write_command(["litp", "fit"])
    first, second = run.command.read_text().splitlines()
    assert first.startswith("litp fit --data 'my cat'  # 20") and second.startswith("litp fit  # 20")
    described = json.loads(run.write_env().read_text())
    assert described["versions"]["torch"] and described["python"] and described["cpus"] >= 1
    assert run.recipe == "" and "recipe" not in described
    run.write_record("name: cat\n", "custom_diffusion")
    run.write_record("name: cat\n")
    assert run.recipe == "custom_diffusion", "a start that names none keeps what is known"
    assert run.checkpoints.is_dir() and run.samples.is_dir() and run.exports.is_dir()


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    atomic.write_text(path, "old: ä\n")
    with pytest.raises(ZeroDivisionError), atomic.replacing(path) as temporary:
        temporary.write_text("new")
        raise ZeroDivisionError
    with pytest.raises(FileNotFoundError), atomic.replacing(path):
        pass
    assert path.read_bytes() == "old: ä\n".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]
