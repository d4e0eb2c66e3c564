"""A scan as an array of a real Slurm: the bytes of one task's scan, also when a task was cancelled in the middle."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lit_personalize.cli.main import main
from lit_personalize.tinyworld.dataset import sample_pictures, write_shards

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "slurm/lit_slurm/templates/retrieve.sbatch"
HOLDERS = ["", "kernels", "datamodules", "callbacks", "slurm"]
SHARDS, TASKS = 16, 2
WAIT = 400  # seconds for an array or a merge
GIVEN = ["--query", "a red star on a beach", "--shards", "laion/*.tar", "--clip", "tinyworld", "--n", "20",
         "--batch-size", "8"]  # fmt: skip


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


@pytest.fixture
def submit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slurm_box: None) -> Iterator[Callable[..., str]]:
    """Submit an array, or what depends on one, to a Slurm whose jobs find this `litp`; gives its number."""
    program = tmp_path / "bin/litp"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lit_personalize "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", ":".join(str(ROOT / holder) for holder in HOLDERS))
    jobs: list[str] = []

    def submit(out: str, dependency: str = "") -> str:
        how = [f"--dependency=afterok:{dependency}"] if dependency else [f"--array=0-{TASKS - 1}"]
        jobs.append(slurm("sbatch", "--parsable", *how, str(SCRIPT), *GIVEN, "-o", out))
        return jobs[-1]

    yield submit
    subprocess.run(["scancel", *jobs], capture_output=True, timeout=60)  # what a failure leaves


def wait(job: str) -> None:
    until = time.monotonic() + WAIT
    while slurm("squeue", "--noheader", "--jobs", job):
        assert time.monotonic() < until, slurm("squeue", "--jobs", job)
        time.sleep(0.2)


def hashes(folder: str) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(folder).iterdir() if p.is_file()}


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_an_array_gives_the_bytes_of_one_task(
    submit: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_shards(sample_pictures(SHARDS * 30, 5), Path("laion"), per_shard=30)
    assert main(["data", "retrieve", *GIVEN, "-o", "one"]) == 0
    scan = submit("array")
    while not list(Path("array/parts").glob("*/*.parquet")):
        assert slurm("squeue", "--noheader", "--jobs", scan), "the array ended without a part"
        time.sleep(0.05)
    slurm("scancel", scan)
    wait(scan)
    done = len(list(Path("array/parts").glob("*/*.parquet")))
    assert 0 < done < SHARDS
    scan = submit("array")
    merge = submit("array", scan)
    wait(scan)
    wait(merge)
    assert hashes("array") == hashes("one") and {"00000.tar", "retrieval.json"} <= set(hashes("one"))
