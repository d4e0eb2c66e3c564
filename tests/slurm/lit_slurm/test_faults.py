"""What a cluster does to jobs, all at once on a real Slurm: every run ends with the weights of an undisturbed one.

Eight runs of an array fill two nodes until a job of higher priority takes three cores; one run meets its time limit;
one loses its node. `LITP_RECORD=FILE` keeps the figures for docs/reliability.md.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from box_runs import STEPS, same, submit, until, waiting, weights, write_place

from lit_personalize import checkpoints
from lit_personalize.cli.main import main
from lit_personalize.report.circumstances import circumstances

TASKS, TAKEN = 8, 3
LIMITED, LOST = TASKS, TASKS + 1
"""Seeds of the runs with a time limit and without a node."""
WAIT = 600.0
HOLD = '[{"class_path": "hold_at.HoldAt", "init_args": {"folder": "holds/%s", "seed": %s, "before": %s}}]'
SEED = "--model.init_args.seed"


def held(name: str, what: str = "held") -> bool:
    return Path("holds", name, what).exists()


def held_run(name: str, seed: int | str, *more: str) -> str:
    """Submit a run that waits in the midst of its training for what happens to it."""
    hold = HOLD % (name, seed, STEPS - 1)
    return submit(name, SEED, str(seed), "--trainer.callbacks", hold, *more)


def log_of(name: str, job: str) -> Path:
    return Path("runs/slurm", name, f"{job}.log")


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            children.setdefault(int((entry / "stat").read_text().rpartition(")")[2].split()[1]), []).append(
                int(entry.name)
            )
    found, rest = [pid], [pid]
    while rest:
        more = children.get(rest.pop(), [])
        found += more
        rest += more
    return found


def lose_node(box: Path, node: str, job: str) -> None:
    """Everything that runs on a node is gone at once, and Slurm finds that the node does not answer."""
    steps = [
        int(entry.parent.name)
        for entry in Path("/proc").glob("[0-9]*/cmdline")
        if entry.read_bytes().startswith(f"slurmstepd: [{job}.".encode())
    ]
    assert steps
    for pid in [int((box / f"{node}.pid").read_text()), *(p for step in steps for p in descendants(step))]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    slurm("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")


def limit_soon(job: str) -> None:
    """Lower the limit of a running job to the next minutes; Slurm gives the notice up to half a minute early."""
    *_, minutes, seconds = slurm("squeue", "-h", "-j", job, "-o", "%M").split(":")
    slurm("scontrol", "update", f"JobId={job}", f"TimeLimit={(60 * int(minutes) + int(seconds) + 45) // 60 + 1}")


def durable(name: str) -> float:
    """Seconds from the notice in the process to the published checkpoint."""
    given = float(Path("holds", name, "noticed").read_text())
    (_, path), *_ = checkpoints.published(Path("runs", name, "checkpoints"))
    return path.stat().st_ctime - given  # of the rename


@pytest.fixture(scope="module")
def outcome(slurm_box: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Let everything happen; by name of the run, what it ended with. The working directory holds the runs."""
    place = write_place(tmp_path_factory.mktemp("faults"), restarts=9, nodes=1, extra=["--exclude=n3,n4"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("XDG_CONFIG_HOME", str(place / "config"))
        began = time.monotonic()
        yield {**_happen(slurm_box), "began": began}


def _happen(box: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    on = "[--nodelist=n%d]"
    limited = held_run("limited", LIMITED, "--slurm.extra", on % 4, "--slurm.lead", "10")
    lost = held_run("lost", LOST, "--slurm.extra", on % 3, "--checkpoint.every", "5")
    until(lambda: held("limited") and held("lost"), "first runs in training", log_of("limited", limited), WAIT)
    lose_node(box, "n3", lost)
    limit_soon(limited)
    array = held_run("task-{task}", "{task}", "--slurm.array", f"0-{TASKS - 1}")
    names = [f"task-{task}" for task in range(TASKS)]

    until(lambda: held("limited", "noticed"), "a time limit", log_of("limited", limited), WAIT)
    until(lambda: not (w := waiting(limited)) or "RUNNING" not in w, "the save", log_of("limited", limited), WAIT)
    slurm("scontrol", "update", f"JobId={limited}", "TimeLimit=60")
    slurm("slurmd", "-N", "n3")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for seed in range(TASKS + 2):
        given = ["--name", f"undisturbed-{seed}", SEED, str(seed), "--trainer.devices", "1"]
        assert main(["fit", "-c", "run.yaml", *given]) == 0
    torch.set_num_threads(threads)
    until(lambda: all(held(name) for name in names), "eight runs", log_of("task-task", f"{array}_0"), WAIT)
    high = submit("high", SEED, "0", "--slurm.partition", "high", "--slurm.cpus", str(TAKEN))
    until(lambda: sum(held(name, "noticed") for name in names) >= TAKEN, "preemption", log_of("high", high), WAIT)
    found["preempted"] = [name for name in names if held(name, "noticed")]
    until(
        lambda: all(checkpoints.published(Path("runs", name, "checkpoints")) for name in found["preempted"]),
        "saves", log_of("high", high), WAIT,
    )  # fmt: skip
    found["durable"] = {name: durable(name) for name in [*found["preempted"], "limited"]}
    found["steps"] = {name: checkpoints.published(Path("runs", name, "checkpoints"))[0][0] for name in found["durable"]}
    for name in names:
        Path("holds", name, "go").touch()
    jobs = {"high": high, "limited": limited, "lost": lost, "task-{task}": array}
    for name, job in jobs.items():
        until(lambda job=job: not waiting(job), f"end of {name}", log_of(name, job), WAIT)  # type: ignore[misc]
    found["logs"] = {p.parent.name + "/" + p.stem: p.read_text() for p in Path("runs/slurm").glob("*/*.log")}
    return found


def result(name: str, seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return weights(name), weights(f"undisturbed-{seed}")


def log(outcome: dict[str, Any], name: str) -> str:
    (text,) = [text for key, text in outcome["logs"].items() if key.startswith(f"{name}/")]
    return str(text)


@pytest.mark.slurm
@pytest.mark.timeout(1800)
def test_every_run_of_an_array_is_its_own(outcome: dict[str, Any]) -> None:
    """Three were preempted in the midst of their training, and none went on from another's state."""
    seeds = [weights(f"undisturbed-{seed}") for seed in range(TASKS + 2)]
    assert not any(same(seeds[i], seeds[j]) for i in range(len(seeds)) for j in range(i)), "all are different"
    for task in range(TASKS):
        assert same(*result(f"task-{task}", task)), f"task {task}"
    assert len(outcome["preempted"]) == TAKEN
    for name in outcome["preempted"]:
        text = next(t for key, t in outcome["logs"].items() if key.endswith(f"_{name.removeprefix('task-')}"))
        assert f"resumed at step {outcome['steps'][name]} of {STEPS}" in text, text[-2000:]
        assert f"SIGTERM step={outcome['steps'][name]} " in Path("runs", name, "preempt.log").read_text()
    rest = {f"task-{task}" for task in range(TASKS)} - set(outcome["preempted"])
    assert not any(Path("runs", name, "preempt.log").exists() for name in rest)


@pytest.mark.slurm
def test_the_job_that_preempted_others_ends_as_well(outcome: dict[str, Any]) -> None:
    assert same(*result("high", 0))


@pytest.mark.slurm
def test_a_time_limit(outcome: dict[str, Any]) -> None:
    text = log(outcome, "limited")
    assert same(*result("limited", LIMITED)), text[-2000:]
    assert f"resumed at step {outcome['steps']['limited']} of {STEPS}" in text
    assert "SIGUSR2 step=" in Path("runs/limited/preempt.log").read_text()
    assert "DUE TO TIME LIMIT" not in text


@pytest.mark.slurm
def test_a_lost_node(outcome: dict[str, Any]) -> None:
    """It goes on from the last of its periodic checkpoints; the log of its first start ends in the midst."""
    held_at = random.Random(LOST).randrange(1, STEPS - 1)
    assert f"resumed at step {held_at // 5 * 5} of {STEPS}" in (text := log(outcome, "lost")), text[-2000:]
    assert same(*result("lost", LOST))
    assert len(Path("runs/lost/command.txt").read_text().splitlines()) == 2
    assert not Path("runs/lost/preempt.log").exists() and "queued again" not in text


@pytest.mark.slurm
def test_figures(outcome: dict[str, Any]) -> None:
    """A notice is heeded at the next step, and these steps are short."""
    spent = list(outcome["durable"].values())
    assert len(spent) == TAKEN + 1 and 0 < min(spent) and max(spent) < 20
    if path := os.environ.get("LITP_RECORD"):
        tasks = {f"task-{task}": task for task in range(TASKS)}
        runs = {
            "preempted": {name: tasks[name] for name in outcome["preempted"]},
            "rest of the array": {name: seed for name, seed in tasks.items() if name not in outcome["preempted"]},
            "high priority": {"high": 0}, "time limit": {"limited": LIMITED}, "lost node": {"lost": LOST},
        }  # fmt: skip
        figures = {
            "circumstances": circumstances(Path(__file__).parent),
            "runs": {what: len(of) for what, of in runs.items()},
            "other weights": {w: sum(not same(*result(n, s)) for n, s in of.items()) for w, of in runs.items()},
            "seconds from notice to durable": sorted(round(s, 3) for s in spent),
            "seconds": round(time.monotonic() - outcome["began"]),
        }
        Path(path).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
