"""Seconds per adapter of three ways to make many: a process for each, one after the other in a process, and a bank.

All three are the program's own commands on the same pictures and recipe (Weights2Weights' on the embedded base), with
export and without pictures, checkpoints or the stock client's check: `litp fit` started for each adapter, as published
scripts are; `lit_personalize.fit` called for each in one process; `litp bank run`. They take turns in one run. What a
process for each costs over one process is start-up; what one after the other costs over the bank is batching. How far
batching can go is what `bank_speed.py` measures.

    python benchmarks/bank_runs.py [--slots 32] [--steps 200] [--alone 3] [--sequence 8] [--threads 2] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lit_personalize.report.circumstances import circumstances
from lit_personalize.tinyworld.identities import write_people

RECIPE = "weights2weights/tinyworld"
IN_ONE = """
import sys
from lit_personalize import fit
for line in sys.stdin.read().splitlines():
    fit(line.split("\\t"))
"""


def options_of(folder: Path, name: str, people: Path, steps: int) -> list[str]:
    """Of `litp fit` for one adapter."""
    concept = json.dumps([{"path": str(people / name), "class_noun": "critter"}])
    return [
        "-c", RECIPE, "--name", name, "--root", str(folder), "--trainer.max_steps", str(steps),
        "--data.init_args.concepts", concept, "--export.formats", "[diffusers]", "--export.verify", "false",
        "--sampling.every", str(10 * steps), "--checkpoint.every", str(10 * steps),
    ]  # fmt: skip


def timed(command: list[str], threads: int, text: str | None = None) -> float:
    """Wall seconds of a command.

    Raises:
        RuntimeError: It failed; with the end of what it said.
    """
    started = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:6])}: {done.stderr[-2000:]}")
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description="Three ways to make many adapters, side by side.")
    parser.add_argument("--slots", type=int, default=32, help="adapters of the bank")
    parser.add_argument("--steps", type=int, default=200, help="of each adapter")
    parser.add_argument("--alone", type=int, default=3, help="adapters with a process for each, in each round")
    parser.add_argument("--sequence", type=int, default=8, help="adapters one after the other, in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    python, litp = [sys.executable], [sys.executable, "-m", "lit_personalize"]
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as place:
        people = Path(place) / "people"
        write_people(people, options.slots)
        names = sorted(path.name for path in people.iterdir() if path.is_dir())
        for number in range(options.rounds):
            folder = Path(place) / f"round-{number}"

            def alone(folder: Path = folder) -> float:
                lines = [options_of(folder / "alone", n, people, options.steps) for n in names[: options.alone]]
                return sum(timed([*litp, "fit", *line], options.threads) for line in lines) / len(lines)

            def sequence(folder: Path = folder) -> float:
                lines = [options_of(folder / "one", n, people, options.steps) for n in names[: options.sequence]]
                text = "\n".join("\t".join(line) for line in lines)
                return timed([*python, "-c", IN_ONE], options.threads, text) / len(lines)

            def bank(folder: Path = folder) -> float:
                command = [
                    *litp, "bank", "run", str(people), "--out", str(folder / "bank"), "-c", RECIPE, "--class-noun",
                    "critter", "--slots", str(options.slots), "--verify", "none", "--trainer.max_steps",
                    str(options.steps), "--checkpoint.every", str(10 * options.steps),
                ]  # fmt: skip
                return timed(command, options.threads) / options.slots

            ways = {"a process for each": alone, "one after the other": sequence, "bank": bank}
            order = list(ways.items()) if number % 2 == 0 else list(ways.items())[::-1]
            rounds.append({name: round(run(), 2) for name, run in order})
            print(rounds[-1], file=sys.stderr, flush=True)
    mean = {
        name: sum(r[name] for r in rounds) / len(rounds)
        for name in ("a process for each", "one after the other", "bank")
    }  # noqa: E501
    result = circumstances(Path(__file__).parent) | {
        "threads": options.threads, "load of the machine": [round(x, 1) for x in os.getloadavg()],
        "slots": options.slots, "steps": options.steps, "adapters with a process for each": options.alone,
        "adapters one after the other": options.sequence, "seconds per adapter": rounds,
        "start-up": round(mean["a process for each"] / mean["one after the other"], 2),
        "batching": round(mean["one after the other"] / mean["bank"], 2),
        "together": round(mean["a process for each"] / mean["bank"], 2),
    }  # fmt: skip
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
