"""What the methods cost, side by side: trained parameters, speed, memory and file size, by a short training of each.

    python -m lit_personalize.report.costs [--steps 40] [--rounds 3] [--out docs/science/costs.json]

Every training has a process of its own; methods take turns in every round, so that a slow minute strikes all of them.
Speeds of a shared machine mean little by themselves: the page shows each as a ratio to the first method's.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lit_personalize.atomic import write_text
from lit_personalize.report.circumstances import circumstances
from lit_personalize.report.science import METHODS, SEEDS
from lit_personalize.report.training import prepare, train
from lit_personalize.tinyworld.concepts import SUBJECTS_FOR_SCIENCE

WARM = 10
"""Steps that are not timed."""
OUT = Path("docs/science/costs.json")


class StepTimes(pl.Callback):
    """Writes the seconds of every step but the first ones, and what trains, to a JSON file."""

    def __init__(self, path: str):
        self.path, self.seconds = Path(path), list[float]()
        self.started = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        found = {"trained parameters": trained, "seconds": self.seconds[WARM:]}
        write_text(self.path, json.dumps(found))


def measure(method: str, steps: int, cache: Path) -> dict[str, Any]:
    """Train one method on the first subject, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        work, entry = Path(folder), METHODS[method]
        learned = prepare(work, SUBJECTS_FOR_SCIENCE[0], SEEDS[0], entry, cache)
        times = work / "times.json"
        callback = json.dumps([{"class_path": f"{__spec__.name}.StepTimes", "init_args": {"path": str(times)}}])
        run = train(work, "cost", entry, [learned], SEEDS[0], steps, ("--trainer.callbacks", callback))
        files = [path for path in run.exports.rglob("*") if path.suffix == ".safetensors"]
        found = json.loads(times.read_text(encoding="utf-8"))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # in KiB on Linux
        return {**found, "peak bytes": peak, "file bytes": sum(path.stat().st_size for path in files)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure what the methods cost on the embedded world.")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--cache", type=Path, help="folder that keeps generated sets for the next start")
    parser.add_argument("--one", choices=list(METHODS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.steps <= WARM:
        parser.error(f"--steps {options.steps}: more than the {WARM} that are not timed")
    if options.one:
        print(json.dumps(measure(options.one, options.steps, options.cache)))
        return 0
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(options.rounds):
            for name, found in rounds.items():
                command = [sys.executable, "-m", __spec__.name, "--one", name, "--steps", str(options.steps),
                           "--cache", str(options.cache or scratch)]  # fmt: skip
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found.append(json.loads(done.stdout.splitlines()[-1]))
                seconds = statistics.median(found[-1]["seconds"])
                print(f"round {number + 1}, {name}: {seconds:.3f} s", file=sys.stderr, flush=True)
    write_text(options.out, json.dumps(summary(rounds, options.steps), indent=1) + "\n")
    return 0


def summary(rounds: dict[str, list[dict[str, Any]]], steps: int) -> dict[str, Any]:
    """By method: medians over rounds, and of the speed relative to the first method's in the same round."""
    first = [statistics.median(one["seconds"]) for one in next(iter(rounds.values()))]
    methods = {}
    for name, found in rounds.items():
        seconds = [statistics.median(one["seconds"]) for one in found]
        methods[name] = {
            "trained parameters": found[0]["trained parameters"],
            "steps per second": 1 / statistics.median(seconds),
            "speed ratio": statistics.median(own / mine for own, mine in zip(first, seconds, strict=True)),
            "peak bytes": max(one["peak bytes"] for one in found),
            "file bytes": found[0]["file bytes"],
        }
    about = {"circumstances": circumstances(Path(__file__).parent), "steps": steps, "rounds": len(first)}
    return {**about, "methods": methods}


if __name__ == "__main__":
    sys.exit(main())
