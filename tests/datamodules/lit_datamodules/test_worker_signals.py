"""Workers outlive a cluster's notice and Ctrl-C, and still end with their loader or its process."""

from __future__ import annotations

import multiprocessing
import operator
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import pytest

from lit_datamodules.step_loader import StepLoader

ALL = (signal.SIGUSR2, signal.SIGUSR1, signal.SIGINT, signal.SIGTERM)


def slots(step: int) -> list[int]:
    return [-2 * step, -2 * step - 1]


def finish(items: list[int]) -> dict[str, Any]:
    return {"values": items}


def hit(workers: Iterable[Any], *numbers: signal.Signals) -> None:
    for worker in workers:
        for number in numbers:
            os.kill(worker.pid, number)


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_workers_live_on(how: Literal["fork", "spawn"], capfd: pytest.CaptureFixture[str]) -> None:
    """Hit while they are being started, and while they draw; this process has a handler that a fork inherits."""
    own = {number: signal.signal(number, lambda *_: print("the training's handler", flush=True)) for number in ALL}
    known, started = set(multiprocessing.active_children()), threading.Event()

    def hit_at_birth() -> None:
        hurt: set[Any] = set()
        while not started.is_set():
            young = set(multiprocessing.active_children()) - known - hurt
            hit(young, *ALL)
            hurt |= young
            time.sleep(0.001)

    loader = StepLoader(slots, operator.neg, finish, 12, 2, how)
    thread = threading.Thread(target=hit_at_birth)
    thread.start()
    try:
        steps = iter(loader)
        assert next(steps)["values"] == [0, 1]
        started.set()
        workers = set(multiprocessing.active_children()) - known
        assert len(workers) == 2
        for number in ALL:
            hit(workers, number)
            time.sleep(0.05)
            next(steps)
        assert [batch["values"] for batch in steps] == [[2 * k, 2 * k + 1] for k in range(5, 12)]
        assert all(worker.is_alive() for worker in workers)
    finally:
        started.set()
        thread.join()
        loader.close()
        for number, handler in own.items():
            signal.signal(number, handler)
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive(), "closed, it ends"
    assert "the training's handler" not in capfd.readouterr().out


LEFT_OPEN = """
import multiprocessing, os, signal, sys, time
from lit_datamodules.step_loader import StepLoader

def train():
    global steps
    loader = StepLoader(lambda step: [1000 * (step > 2)], time.sleep, tuple, 100, 2)
    steps = iter(loader)
    next(steps)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGTERM)
    next(steps)  # the workers are about to draw for a long time
    sys.exit(7)

if sys.argv[1] == "own":
    train()
process = multiprocessing.get_context("fork").Process(target=train)
process.start()
process.join()
sys.exit(process.exitcode)
"""


@pytest.mark.parametrize("process", ["own", "of multiprocessing"])
def test_a_process_that_ends_ends_its_workers(process: str) -> None:
    """They ignored a TERM before; without being closed, the loader must not keep its process from ending."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", LEFT_OPEN, process], env=environment, timeout=120)
    assert done.returncode == 7
    assert time.monotonic() - began < 60


KILLED = """
import multiprocessing, operator, os, signal, sys
from lit_datamodules.step_loader import StepLoader

if __name__ == "__main__":
    steps = iter(StepLoader(lambda step: [step], operator.neg, tuple, 100, 2, sys.argv[1]))
    next(steps)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["fork", "forkserver"])
def test_workers_of_a_killed_process_end(how: str, tmp_path: Path) -> None:
    program, output = tmp_path / "killed.py", tmp_path / "output"
    program.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with output.open("w") as file:
        done = subprocess.run([sys.executable, str(program), how], env=environment, stdout=file, timeout=200)
    assert done.returncode == -signal.SIGKILL
    pids = [int(word) for word in output.read_text().split()]
    assert len(pids) == 2
    until = time.monotonic() + 60
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < until, "left behind"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
