"""A bank as an array of a real Slurm: a task is killed, another requeued, at random; every adapter exactly once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from lit_personalize.backbones.tiny import write_tiny_base
from lit_personalize.bank.claims import Ledger
from lit_personalize.bank.export import read_record
from lit_personalize.cli.main import main
from lit_personalize.tinyworld.dataset import sample_pictures, write_folder

ROOT = Path(__file__).parents[3]
PATHS = os.pathsep.join(str(ROOT / holder) for holder in ("", "kernels", "datamodules", "callbacks", "slurm"))
ADAPTERS, TASKS, WAIT = 8, 2, 400


def training(ledger: Ledger) -> dict[str, int]:
    """Task -> process of those that have claimed adapters."""
    claims = [ledger.read(f"claims/{name}") for name in ledger.names("claims")]
    owners = {claim["owner"] for claim in claims if claim}
    told = [ledger.read(f"owners/{name}") for name in sorted(owners)]
    return {str(one["worker"]).partition("-")[0]: int(one["pid"]) for one in told if one}


@pytest.mark.slurm
@pytest.mark.timeout(900)
def test_every_adapter_once_though_tasks_are_killed_and_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm_box: None, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config/litp/slurm").mkdir(parents=True)
    profile = {"partition": "low", "cpus": 1, "environment": {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}}
    (tmp_path / "config/litp/slurm/box.yaml").write_text(yaml.safe_dump(profile))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for number in range(ADAPTERS):
        write_folder(sample_pictures(2, number, kind="critter"), tmp_path / "people" / f"c{number}")
    base = write_tiny_base(tmp_path / "base", "sd1")
    given = ["--model.init_args.base", str(base), "--data.init_args.resolution", "32", "--trainer.max_steps", "12"]
    given += ["--data.init_args.batch_size", "1", "--checkpoint.every", "4"]
    assert main(["bank", "plan", "people", "--out", "corpus", *given]) == 0
    out = tmp_path / "corpus"
    capsys.readouterr()
    assert main(["slurm", "submit", "bank", "corpus", "--profile", "box", "--slurm.array", f"0-{TASKS - 1}",
                 "--slots", "2", "--verify", "none", "--expiry", "60"]) == 0  # fmt: skip
    job = capsys.readouterr().out.strip()
    draw, ledger = random.Random(7), Ledger(out / "jobs")
    ways, killed, after = ["SIGKILL", "requeue"], {}, draw.randrange(3)
    end = time.monotonic() + WAIT

    def logs() -> str:
        return "\n".join(path.read_text()[-1500:] for path in (tmp_path / "slurm").rglob("*.log"))

    while subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True).stdout.strip():
        assert time.monotonic() < end, logs()
        ready = {task: process for task, process in training(ledger).items() if task not in killed}
        if ready and len(ledger.names("done")) >= after:
            task = draw.choice(sorted(ready))
            killed[task] = ways.pop()
            if killed[task] == "SIGKILL":
                os.kill(ready[task], signal.SIGKILL)
            else:
                subprocess.run(["scontrol", "requeue", f"{job}_{task}"], check=True)
            after += draw.randrange(1, 3)
        time.sleep(0.05)
    names = [f"c{number}" for number in range(ADAPTERS)]
    assert sorted(killed) == ["0", "1"] and not ways, logs()
    assert main(["bank", "status", "corpus", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["done"], found["in training"], found["failed"], found["waiting"]) == (ADAPTERS, 0, {}, 0), logs()
    assert sorted(os.listdir(out / "exports")) == names == sorted(ledger.names("done"))
    records = [ledger.read(f"done/{name}") for name in names]
    assert all(r["sha256"] == read_record(out / "exports" / n)["sha256"] for n, r in zip(names, records, strict=True))
    starts = [name.partition("-")[0] for name in ledger.names("owners")]
    assert all(starts.count(task) >= 2 for task in killed), "each task was stopped, and started again"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--slurm.gpus", "4", "--slurm.array", "0-3"], "a bank's process has one GPU"),
        (["--slurm.nodes", "2"], "a bank's process has one GPU"),
    ],
)
def test_shape_of_the_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, more: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["slurm", "render", "bank", "corpus"]) == 2
    assert "is no planned bank" in capsys.readouterr().err
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/jobs.parquet").touch()
    assert main(["slurm", "render", "bank", "corpus", *more]) == 2
    assert said in capsys.readouterr().err
    assert main(["slurm", "render", "bank", "corpus", "--slots", "64"]) == 0
    assert f"bank run {tmp_path}/corpus --slots 64 || status=$?" in capsys.readouterr().out
    assert main(["slurm", "render", "bank", "corpus", "--slurm.array", "0-15%4", "--slurm.gpus", "1"]) == 0
    assert f'bank run {tmp_path}/corpus --shard "$SLURM_ARRAY_TASK_ID"/16 ||' in capsys.readouterr().out
