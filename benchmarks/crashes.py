"""Kill real trainings at seeded moments, half of them within saves, and compare what they end with.

A trial is a run of `litp fit` that is killed by SIGKILL several times, each time started again by the same command, and
at last let finish. Its adapter, its last checkpoint and the samples of its steps must be those of a run that nothing
happened to. Moments are drawn from the trial's seed: uniform over the time that the start would have taken ("time"),
or within a stage of a save, which is watched for ("save"), some of them after a cluster's notice that has asked for
that save ("notice": a lead that was too short). Of two ranks, one is killed. Before its end each run is also stopped
once by a notice to one rank alone, upon which all have to save the same step and end with exit code 75.

    python benchmarks/crashes.py [--kills 50] [--out benchmarks/crashes_cpu.json] [--first-seed 0]

Resumable: finished trials of the file are kept while what is trained is the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from killable_runs import STAGES, Server, Started, stage_of, untrue
from safetensors.torch import load_file
from sample_ledger import Start, compare, counted, starts

from lit_personalize import checkpoints
from lit_personalize.atomic import write_text
from lit_personalize.backbones.tiny import write_tiny_base
from lit_personalize.report.circumstances import circumstances
from lit_personalize.tinyworld.dataset import sample_pictures, write_folder, write_shards

STEPS, EVERY, KEEP = 12, 3, 2
TOKEN = {"token": "<new1>", "init": "CLASS", "lr": 0.02}
RUN: dict[str, Any] = {
    "name": "run",
    "ema": 0.9,
    "model": {
        "class_path": "PriorPreservation",
        "init_args": {
            "base": "../base",
            "adapters": [
                # A rank far above need, so that a save takes a while.
                {"class_path": "LoRA", "init_args": {"rank": 64, "targets": "blocks"}},
                {"class_path": "TokenEmbedding", "init_args": TOKEN},
            ],
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}},
        },
    },
    "data": {
        "class_path": "PersonalizationData",
        "init_args": {
            "concepts": [{"path": "../photos", "class_noun": "cat", "token": "<new1>"}],
            "regularization": {"shards": "../stream/*.tar", "stream": True},
            "resolution": 32, "batch_size": 1, "augmentation": "custom_diffusion",
        },
    },
    "sampling": {"prompts": []},
    "checkpoint": {"every": EVERY, "keep_last": KEEP},
    "export": {"formats": ["diffusers"], "verify": False},
    "trainer": {
        "max_steps": STEPS, "accelerator": "cpu", "log_every_n_steps": 1, "enable_progress_bar": False,
        "callbacks": [{"class_path": "sample_ledger.SampleLedger", "init_args": {"folder": "ledger"}}],
    },
}  # fmt: skip
COMMAND = ("-c", "run.yaml")
KINDS = ("save", "time", "notice", "time")
"""Of the kills of a trial, in turns."""


@dataclass
class Kill:
    """One kill, and what was there after it."""

    kind: str
    rank: int
    stage: str = "no save"
    """How far a save had come; see `killable_runs.stage_of`."""
    step: int = 0
    """Newest step that had ended."""
    found: int = 0
    """Step of the newest whole checkpoint afterwards."""
    codes: list[int] = field(default_factory=list)
    """Exit codes of the ranks."""
    others: float = 0.0
    """Seconds until all other ranks had ended, too."""
    untrue: list[str] = field(default_factory=list)
    """Directories that claimed to be complete and were not."""


@dataclass
class Stop:
    """One notice, given to one rank."""

    rank: int
    step: int
    """That was saved."""
    durable: float
    """Seconds from the signal to the published checkpoint."""
    ended: float
    """Seconds from the signal to the end of all ranks."""
    codes: list[int]


@dataclass
class Undisturbed:
    """A run that nothing happened to, and how long it took."""

    folder: Path
    ledger: list[list[Start]]
    before: float
    """Seconds from the start of the process to that of training."""
    step: float
    """Median seconds of a step."""
    after: float
    """Seconds from the last step to the end of the process."""
    save: float
    """Seconds of a save."""
    state_bytes: int


def place(root: Path) -> None:
    """Photos, streamed shards and a base that all trials share."""
    write_folder(sample_pictures(3, 1, kind="object"), root / "photos")
    for extra in [*(root / "photos").glob("*.txt"), *(root / "photos").glob("*.json")]:
        extra.unlink()  # captions without the token
    write_shards(sample_pictures(11, 3, kind="object"), root / "stream", per_shard=4)
    write_tiny_base(root / "base", "sd1")


def run_folder(root: Path, name: str, workers: int) -> Path:
    """A folder in which a trial is the run `runs/run`, so that all have one configuration."""
    folder = root / name
    folder.mkdir()
    data = {**RUN["data"], "init_args": {**RUN["data"]["init_args"], "num_workers": workers}}
    (folder / "run.yaml").write_text(yaml.safe_dump({**RUN, "data": data}), encoding="utf-8")
    return folder


def undisturbed(server: Server, root: Path, ranks: int) -> Undisturbed:
    """Train without a kill, while a save is timed from outside."""
    folder = run_folder(root, f"undisturbed-{ranks}", 0)
    saved = folder / "runs/run/checkpoints"
    begun = server.start(COMMAND, folder, ranks)
    seen: dict[str, float] = {}
    while begun.running and len(seen) < 2:
        if "begun" not in seen and checkpoints.staged(saved, 2 * EVERY).exists():
            seen["begun"] = time.monotonic()
        elif checkpoints.directory(saved, 2 * EVERY).exists():
            seen.setdefault("begun", time.monotonic())
            seen["ended"] = time.monotonic()
        time.sleep(0.0005)
    codes = begun.wait()
    ended = time.monotonic()
    if codes != [0] * ranks:
        raise RuntimeError(f"the undisturbed run ended with {codes}: {(folder / 'log-0.txt').read_text()[-2000:]}")
    ledger = [starts(folder / "ledger", rank) for rank in range(ranks)]
    times = ledger[0][0].times
    spent = [b - a for a, b in zip(times[:-1], times[1:], strict=True)]
    state = checkpoints.directory(saved, STEPS) / checkpoints.STATE
    return Undisturbed(
        folder, ledger, times[0] - begun.began, statistics.median(spent), ended - times[-1],
        seen["ended"] - seen["begun"], state.stat().st_size,
    )  # fmt: skip


def trial(server: Server, root: Path, seed: int, reference: Undisturbed, kills: int, workers: int) -> dict[str, Any]:
    """One run with its kills; all figures of it."""
    ranks, draw = len(reference.ledger), random.Random(seed)
    folder = run_folder(root, f"trial-{seed}", workers)
    done: list[Kill] = []
    began = time.monotonic()
    for number in range(2 * kills):
        kill = Kill(KINDS[(number + seed) % len(KINDS)], draw.randrange(ranks))
        if _kill_one(server, folder, reference, kill, draw):
            done.append(kill)
        if len(done) == kills or _has_finished(folder):
            break
    stop = _stop_one(server, folder, reference, draw)
    codes = server.start(COMMAND, folder, ranks).wait()
    ledgers = [starts(folder / "ledger", rank) for rank in range(ranks)]
    differences = [compare(*both) for both in zip(ledgers, reference.ledger, strict=True)]
    trained = sum(len(start.shown) for start in ledgers[0])
    found = {
        "seed": seed, "ranks": ranks, "workers": workers, "kills": [asdict(kill) for kill in done],
        "stop": asdict(stop) if stop else None, "codes": codes,
        "same export": codes == [0] * ranks and exported(folder) == exported(reference.folder),
        "same state": codes == [0] * ranks and last_state(folder) == last_state(reference.folder),
        "leftovers": [path.name for path in (folder / "runs/run/checkpoints").glob(".*")],
        **{name: sum(one[name] for one in differences) for name in differences[0]},
        "steps trained": trained, "steps that count": len(counted(ledgers[0])),
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    if verdict(found):
        print(f"trial {seed}: {', '.join(verdict(found))}; see {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder)
    return found


def _has_finished(folder: Path) -> bool:
    return (folder / "runs/run/exports/finished.json").exists()


def _kill_one(server: Server, folder: Path, reference: Undisturbed, kill: Kill, draw: random.Random) -> bool:
    """Start the run and kill one rank at a drawn moment; whether it was in time."""
    saved, ranks = folder / "runs/run/checkpoints", len(reference.ledger)
    before = checkpoints.find_complete(saved)
    step = before.step if before else 0
    saves = list(range(step + EVERY, STEPS + 1, EVERY))
    if not saves and kill.kind != "time":
        kill.kind = "time"  # only the export is left
    started = server.start(COMMAND, folder, ranks)
    whole = reference.before + (STEPS - step) * reference.step + reference.after
    kill.step = step
    if kill.kind == "time":
        _wait_for(draw.random() * whole, started, folder, reference, kill.rank, STEPS - step)
        target = 0
    else:
        target = draw.choice(saves[:2])  # later ones would leave little for further kills
        possible = STAGES[1 : -1 if target > KEEP * EVERY else -2]  # there is something to prune, or not
        share, part, stage = draw.random(), draw.random(), draw.choice(possible)
        _until_training(started, folder, kill.rank)
        if kill.kind == "notice":
            _notify(started, kill.rank, share * (target - step) * reference.step)
            newest = checkpoints.published(saved)[-1:]
            _wait(started, lambda: any(saved.glob(".tmp-step-*")) or checkpoints.published(saved)[-1:] != newest)
            target = next((int(p.name.rpartition("-")[2]) for p in saved.glob(".tmp-step-*")), target)
        else:
            _wait(started, lambda: checkpoints.staged(saved, target).exists())
        wanted = STAGES.index(stage)
        _wait(started, lambda: STAGES.index(stage_of(saved, target, KEEP, reference.state_bytes)) >= wanted)
        moment = time.monotonic() + 0.2 * part * reference.save
        while time.monotonic() < moment:
            time.sleep(0.0002)
    if not started.running:
        if by_itself := set(started.wait()) - {0, 75}:
            raise RuntimeError(f"a start ended with {by_itself} by itself; see {folder}")
        return False
    started.signal(kill.rank, signal.SIGKILL)
    killed = time.monotonic()
    if target:
        started.processes[kill.rank].join()
        kill.stage = stage_of(saved, target, KEEP, reference.state_bytes)
    kill.codes = started.wait()
    kill.others = round(time.monotonic() - killed, 2) if ranks > 1 else 0.0
    after_all = checkpoints.find_complete(saved)
    kill.found = after_all.step if after_all else 0
    kill.step = max([step, *(s for start in starts(folder / "ledger", kill.rank)[-1:] for s, _ in start.shown)])
    kill.untrue = untrue(saved) + [f"step {step} is gone"] * (kill.found < step)
    return True


def _stop_one(server: Server, folder: Path, reference: Undisturbed, draw: random.Random) -> Stop | None:
    """Start the run and give a notice to one rank alone; None if it ended before."""
    saved, ranks = folder / "runs/run/checkpoints", len(reference.ledger)
    found = checkpoints.find_complete(saved)
    rank, part = draw.randrange(ranks), draw.random()
    started = server.start(COMMAND, folder, ranks)
    _until_training(started, folder, rank)
    given = _notify(started, rank, part * (STEPS - (found.step if found else 0)) * reference.step)
    codes = started.wait()
    if codes == [0] * ranks:
        return None
    step, path = checkpoints.published(saved)[-1]
    durable = path.stat().st_ctime - given  # a rename changes it
    return Stop(rank, step, round(durable, 3), round(time.time() - given, 3), codes)


def _until_training(started: Started, folder: Path, rank: int) -> None:
    """Wait until a start has come to training and has cleared what a killed save had left."""
    begun = len(starts(folder / "ledger", rank))
    leftovers = (folder / "runs/run/checkpoints").glob
    _wait(started, lambda: len(starts(folder / "ledger", rank)) > begun and not any(leftovers(".tmp-step-*")))


def _wait_for(moment: float, started: Started, folder: Path, reference: Undisturbed, rank: int, steps: int) -> None:
    """Wait until a start is as far as it was to be after `moment` seconds, however slow the machine is just now."""
    rest = moment
    if moment >= reference.before:
        begun = len(starts(folder / "ledger", rank))
        done = min(steps, int((moment - reference.before) / reference.step))
        _wait(started, lambda: len(starts(folder / "ledger", rank)) > begun)
        _wait(started, lambda: len(starts(folder / "ledger", rank)[-1].shown) >= done)
        rest = moment - reference.before - done * reference.step
    until = time.monotonic() + rest
    _wait(started, lambda: time.monotonic() >= until)


def _notify(started: Started, rank: int, seconds: float) -> float:
    """Send USR2 after a while; when it was sent."""
    moment = time.monotonic() + seconds
    _wait(started, lambda: time.monotonic() >= moment)
    given = time.time()
    started.signal(rank, signal.SIGUSR2)
    return given


def _wait(started: Started, true: Callable[[], bool]) -> None:
    until = time.monotonic() + 120
    while started.running and not true() and time.monotonic() < until:
        time.sleep(0.0005)


def exported(folder: Path) -> dict[str, bytes]:
    """All exported tensors, as bytes."""
    return {
        f"{path.name}/{name}": tensor.numpy().tobytes()
        for path in sorted((folder / "runs/run/exports").glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def last_state(folder: Path) -> dict[str, bytes]:
    """All tensors of the last checkpoint, as bytes, by their place in it."""

    def walk(value: Any, name: str) -> dict[str, bytes]:
        if isinstance(value, torch.Tensor):
            return {name: value.numpy().tobytes()}
        pairs = value.items() if isinstance(value, dict) else ()
        items = enumerate(value) if isinstance(value, list | tuple) else pairs
        return {n: b for key, part in items for n, b in walk(part, f"{name}/{key}").items()}

    return walk(checkpoints.read_state(checkpoints.directory(folder / "runs/run/checkpoints", STEPS)), "")


def verdict(found: dict[str, Any]) -> list[str]:
    """What is wrong with a trial; empty if it is as if nothing had happened."""
    wrong = [name for name in ("same export", "same state") if not found[name]]
    wrong += [f"{name} {found[name]}" for name in ("lost", "doubled", "other", "leftovers") if found[name]]
    if found["stop"] and set(found["stop"]["codes"]) != {75}:
        wrong.append(f"stopped with {found['stop']['codes']}")
    wrong += [f"ended with {found['codes']}"] if any(found["codes"]) else []
    return wrong + [text for kill in found["kills"] for text in kill["untrue"]]


def settings() -> str:
    """A hash of what is trained and how it is killed."""
    return hashlib.sha256(json.dumps([RUN, KINDS]).encode()).hexdigest()[:16]


def shape(seed: int) -> tuple[int, int, int]:
    """Ranks, workers and number of kills of a trial."""
    return ((1, 0, 3), (2, 0, 2), (1, 2, 3))[seed % 3]


def measure(kills: int, out: Path | None = None, first_seed: int = 0, jobs: int = 1) -> dict[str, Any]:
    """Trials until there were so many kills, some at once; those that `out` holds are kept."""
    known: dict[int, dict[str, Any]] = {}
    past: dict[str, Any] = {}
    if out is not None and out.exists():
        before = json.loads(out.read_text(encoding="utf-8"))
        if before["settings"] == settings():
            known = {one["seed"]: one for one in before["trials"]}
            past = before["undisturbed"]
    report = {"circumstances": circumstances(Path(__file__).parent), "settings": settings(), "steps": STEPS,
              "every": EVERY, "undisturbed": past, "trials": []}  # fmt: skip
    trials: list[dict[str, Any]] = report["trials"]
    references: dict[int, Undisturbed] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        place(root)
        server = Server()
        seed, left = first_seed, kills
        with ThreadPoolExecutor(jobs) as pool:
            while left > 0:
                batch, planned = [], left
                while planned > 0 and len(batch) < jobs:
                    ranks, workers, number = shape(seed)
                    if seed not in known and ranks not in references:
                        references[ranks] = of = undisturbed(server, root, ranks)
                        past[str(ranks)] = {
                            "seconds to the first step": of.before, "seconds of a step": of.step,
                            "seconds of a save": of.save, "state bytes": of.state_bytes,
                        }  # fmt: skip
                    batch.append((seed, references.get(ranks), min(number, planned), workers))
                    seed, planned = seed + 1, planned - number
                done = list(pool.map(lambda one: known.get(one[0]) or trial(server, root, *one), batch))
                trials += done
                left -= sum(len(one["kills"]) for one in done)
                if out is not None:
                    write_text(out, json.dumps(report, indent=1) + "\n")
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="trials at once")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    report = measure(options.kills, options.out, options.first_seed, options.jobs)
    wrong = {one["seed"]: verdict(one) for one in report["trials"] if verdict(one)}
    counts = {"kills": sum(len(one["kills"]) for one in report["trials"]), "wrong": wrong}
    print(json.dumps(counts))
    return 1 if wrong else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
