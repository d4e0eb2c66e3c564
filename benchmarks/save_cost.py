"""What a save costs a training: bytes, and the time that the next step waits, beside the time of a step.

The recipe `lora/tinyworld` on the embedded base, by `litp fit`; a save every few steps. The wait is the median step
with a save before it less the median step without.

    python benchmarks/save_cost.py [--steps 60] [--out benchmarks/save_cost_cpu.json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sample_ledger import starts

from lit_personalize import checkpoints
from lit_personalize.cli.main import main as litp
from lit_personalize.report.circumstances import circumstances
from lit_personalize.tinyworld.dataset import sample_pictures, write_folder

EVERY = 4


def measure(steps: int, *more: str) -> dict[str, Any]:
    """Train in a temporary folder; `more` are arguments of `litp fit`."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            write_folder(sample_pictures(4, 1, kind="object"), Path("photos"))
            for extra in [*Path("photos").glob("*.txt"), *Path("photos").glob("*.json")]:
                extra.unlink()
            given = ["--images", "photos", "--class-noun", "star", "--method", "lora", "--name", "run"]
            ledger = '[{"class_path": "sample_ledger.SampleLedger", "init_args": {"folder": "ledger"}}]'
            fit = ["-c", "run.yaml", "--trainer.max_steps", str(steps), "--checkpoint.every", str(EVERY),
                   "--trainer.callbacks", ledger, "--sampling.prompts", "[]", "--export.verify", "false",
                   "--trainer.accelerator", "cpu", "--allow", "sample_ledger"]  # fmt: skip
            for command in (["init", *given, "--base", "tinyworld"], ["fit", *fit, *more]):
                if code := litp(command):
                    raise RuntimeError(f"litp {command[0]} ended with {code}")
            return _figures(Path("ledger"), Path("runs/run/checkpoints"))
        finally:
            os.chdir(before)


def _figures(ledger: Path, folder: Path) -> dict[str, Any]:
    (start,) = starts(ledger, 0)
    spent = {step: b - a for (step, _), a, b in zip(start.shown, start.times[:-1], start.times[1:], strict=True)}
    # The ledger's line comes before the save, so the save is in the time of the step after it.
    plain = [seconds for step, seconds in spent.items() if step % EVERY != 1 and step > EVERY]
    waited = [seconds for step, seconds in spent.items() if step % EVERY == 1 and step > EVERY]
    found = checkpoints.find_complete(folder)
    if found is None:
        raise RuntimeError("nothing was saved")
    step = statistics.median(plain)
    return {
        "seconds of a step": step,
        "seconds of a save": statistics.median(waited) - step,
        "steps that a save takes": statistics.median(waited) / step - 1,
        "saves": len(waited),
        "adapter bytes": sum(tensor.nbytes for tensor in checkpoints.load_state(found.path).values()),
        "checkpoint bytes": sum(file.stat().st_size for file in found.path.rglob("*")),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    report = {"circumstances": circumstances(Path(__file__).parent), **measure(options.steps)}
    text = json.dumps(report, indent=1) + "\n"
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
