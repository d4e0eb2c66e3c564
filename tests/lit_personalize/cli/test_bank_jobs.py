"""`litp bank run` in several processes on one table, which are killed at random: every adapter is there once, whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lit_personalize.bank.claims import Ledger, Owner
from lit_personalize.bank.export import read_record
from lit_personalize.cli.main import main
from lit_personalize.tinyworld.dataset import sample_pictures, write_folder

ADAPTERS, KILLS = 14, 12
FILE = "pytorch_lora_weights.safetensors"
NURSERY = """
import json, os, random, signal, sys, time
from pathlib import Path
import lit_personalize.bank.production, lit_personalize.configuration, lit_personalize.export.verify
import lit_personalize.fitting, lit_datamodules.personalization
from lit_personalize.cli.main import main
out, kills, alone = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
random.seed(4)
places = [["--shard", "0/2"], ["--shard", "1/2"], []]  # the last one takes a folder that is free

def start(arguments):
    child = os.fork()
    if not child:
        os.dup2(os.open(f"{out}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY), 1)
        os.dup2(1, 2)
        code = 1
        try:
            code = main(["bank", "run", *arguments, "--slots", "3", "--expiry", "4", "--verify", "none"])
        finally:
            os._exit(code)
    return child

def events():
    folders = (out / "jobs/claims", out / "jobs/done", *out.glob("workers/*/checkpoints"), out / "exports")
    return sum(len(os.listdir(folder)) for folder in folders if folder.is_dir())

_, status = os.waitpid(start([alone]), 0)
assert status == 0, status
running = {}
codes, killed = [], 0
while places or running:
    while places:
        place = places.pop()
        running[start([str(out), *place])] = (place, events() + random.randrange(1, 7))
    for child, (place, after) in list(running.items()):
        done, status = os.waitpid(child, os.WNOHANG)
        if not done and killed < kills and events() >= after:
            os.kill(child, signal.SIGKILL)
            done, status = os.waitpid(child, 0)
            killed += os.WIFSIGNALED(status)
            places.append(place)
        elif done:
            codes.append(os.waitstatus_to_exitcode(status))
        if done:
            del running[child]
    time.sleep(0.003)
print(json.dumps({"killed": killed, "codes": codes}))
"""


def options(base: Path, *more: str) -> list[str]:
    given = ["--model.init_args.base", str(base), "--data.init_args.resolution", "32", "--trainer.max_steps", "6"]
    return [*given, "--data.init_args.batch_size", "1", "--checkpoint.every", "2", *more]


def planned(tmp_path: Path, base: Path, name: str, count: int, *more: str) -> Path:
    for number in range(count):
        if not (place := tmp_path / "people" / f"c{number:02}").is_dir():
            write_folder(sample_pictures(2, number, kind="critter"), place)
    out = tmp_path / name
    assert main(["bank", "plan", str(tmp_path / "people"), "--out", str(out), *options(base, *more)]) == 0
    return out


def state(out: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["bank", "status", str(out), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_every_adapter_once_though_processes_are_killed(
    tiny_bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three processes, twelve kills by SIGKILL while they claim, train, save and export; dead claims expire."""
    out = planned(tmp_path, tiny_bases["sd1"], "killed", ADAPTERS)
    alone = planned(tmp_path, tiny_bases["sd1"], "alone", ADAPTERS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", NURSERY, str(out), str(KILLS), str(alone)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    log = Path(f"{out}.log").read_text()[-3000:] if Path(f"{out}.log").exists() else ""
    assert done.returncode == 0, done.stderr[-2000:] + log
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["killed"] == KILLS and told["codes"] == [0, 0, 0], log
    names = [f"c{number:02}" for number in range(ADAPTERS)]
    found = state(out, capsys)
    assert (found["done"], found["in training"], found["failed"], found["waiting"]) == (ADAPTERS, 0, {}, 0)
    assert sorted(os.listdir(out / "exports")) == names == sorted(Ledger(out / "jobs").names("done"))
    attempts = 0
    for name in names:
        record = Ledger(out / "jobs").read(f"done/{name}")
        assert record["sha256"] == read_record(out / "exports" / name)["sha256"], "what is recorded is what lies there"
        attempts += record["attempt"]
        one, other = (load_file(folder / "exports" / name / FILE) for folder in (out, alone))
        assert one.keys() == other.keys()
        assert max(float((one[key] - other[key]).abs().max()) for key in one) < 1e-4, "undisturbed, in fp32"
    assert attempts > ADAPTERS, "no kill has hit an adapter in training"


def test_others_carry_on_and_failures_are_put_back(
    tiny_bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished export without a record is taken up, a damaged one made anew; a failed adapter waits for retry."""
    out = planned(tmp_path, tiny_bases["sd1"], "bank", 3)
    picture = tmp_path / "people/c01/00000.png"
    whole = picture.read_bytes()
    picture.write_bytes(b"no picture")
    capsys.readouterr()
    run = ["bank", "run", str(out), "--json", "--verify", "none"]
    assert main(run) == 3
    first = json.loads(capsys.readouterr().out)
    assert list(first["failed"]) == ["c01"] and first["done"] == first["finished here"] == 2

    (out / "jobs/done/c00").unlink()  # killed between its two names
    (out / "jobs/done/c02").unlink()
    before = (out / "exports/c00" / FILE).stat().st_mtime_ns
    damaged = out / "exports/c02" / FILE
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert main(run) == 3
    again = json.loads(capsys.readouterr().out)
    assert again["done"] == 2 and again["finished here"] == 1 and list(again["failed"]) == ["c01"]
    assert (out / "exports/c00" / FILE).stat().st_mtime_ns == before
    assert read_record(out / "exports/c02")["sha256"] == Ledger(out / "jobs").read("done/c02")["sha256"]

    assert main(["bank", "retry", str(out), "c00"]) == 2
    assert "c00 did not fail, it is finished" in capsys.readouterr().err
    assert main(["bank", "retry", str(out), "c09"]) == 3
    picture.write_bytes(whole)
    assert main(["bank", "retry", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"put back": 1, "attempts": {"c01": 1}}
    assert main(run) == 0
    assert Ledger(out / "jobs").read("done/c01")["attempt"] == 2
    assert main(["bank", "status", str(out)]) == 0
    assert "3 of 3 (100.0 %)" in capsys.readouterr().out


def test_a_worker_gives_up_what_others_took(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It comes back to its checkpoint of three adapters: one is another's, one finished, one goes on at its step."""
    from lit_personalize.bank.engine import Bank

    out = planned(tmp_path, tiny_bases["sd1"], "bank", 3)
    run = ["bank", "run", str(out), "--shard", "0/2", "--slots", "3", "--verify", "none", "--json", "--expiry", "20"]
    original = Bank.step

    def step(bank: Bank) -> dict[int, str]:
        if bank.steps == 3:
            raise MemoryError("as if it were killed")
        return original(bank)

    monkeypatch.setattr(Bank, "step", step)
    with pytest.raises(MemoryError):
        main(run)
    trained: set[str] = set()

    def noting(bank: Bank) -> dict[int, str]:
        trained.update(slot.job.id for slot in bank.slots)
        return original(bank)

    monkeypatch.setattr(Bank, "step", noting)
    capsys.readouterr()
    ledger = Ledger(out / "jobs")
    assert sorted(ledger.names("claims")) == ["c00.1", "c01.1", "c02.1"]
    (owner,) = ledger.names("owners")
    os.utime(out / "jobs/owners" / owner, (time.time() - 10_000,) * 2)
    with Owner(ledger, "other", 20) as other:
        assert other.claim("c00") and other.claim("c01")
        other.finish("c01", {})
        assert main(run) == 0, "others that live finish their own"
        found = json.loads(capsys.readouterr().out)
        assert (found["done"], found["finished here"], found["steps"]) == (2, 1, 6), "two steps were in the checkpoint"
        assert trained == {"c02"}, "no step for what others have"
        assert ledger.read("done/c02")["attempt"] == 2 and other.held == {"c00": 2}
        assert state(out, capsys)["running"][0]["adapters"] == ["c00"]
