"""How long a GPU takes for the corpus of Weights2Weights: the bank beside a script per adapter, at SD1.5's size.

Ways, each in processes of its own (`bank_ways.py`), in turns, every second round in reverse order:

* stock: diffusers' UNet, PEFT's LoRA, autocast, torch's AdamW, and a process for each adapter, whose start-up counts;
* persistent eager: the same steps in a process that keeps the base, without start-up;
* persistent compile+graph: those with `torch.compile(mode="reduce-overhead")`, on a GPU only;
* bank G: `lit_personalize.bank.Bank` of G adapters.

All have latents and text states cached. Published scripts encode two pictures and two captions at every step: that time
is measured apart and left out, as is their launcher, so what the bank gains over them is at least what is said.
Encoding of pictures, exports and the start-up of what persists are in no way's hours.

    python benchmarks/bank_hours.py --out FILE [--slots 1 8 32 64] [--steps 50] [--rounds 2] [--base DIR]

Without `--base` a base of SD1.5's size with random weights is written to a temporary folder, from where every process
reads it. FILE is replaced after every process; what stands in it is not measured again, so the same command goes on.
What ran out of memory stays so; any other failure is tried again. Hours of an adapter and of the corpus are
extrapolated from the timed steps. The limit is modelled: the FLOP of a step, counted, at an H200's bf16 rate.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from bank_ways import BANK, EAGER, GRAPH, RECIPE, STOCK, recipe

from lit_kernels.measuring import PEAKS
from lit_personalize import atomic
from lit_personalize.report.circumstances import circumstances

FOLDER = Path(__file__).resolve().parent
CORPUS = 64_974
"""Adapters of Weights2Weights."""
TARGET = 9.0
"""Seconds that an adapter should take at most on an H200."""
SAMPLES = 2
"""Of an adapter's step: an instance and a prior picture."""
RANDOM = "sd15, random weights"


# ---- processes ------------------------------------------------------------------------------------


@contextlib.contextmanager
def base_of(options: argparse.Namespace) -> Iterator[Path]:
    """The base's folder; one with random weights is removed again."""
    if options.base is not None:
        yield options.base
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        program = [sys.executable, str(FOLDER / "full_base.py"), folder, "--dtype", recipe()["dtype"]]
        subprocess.run(program, check=True, stdout=subprocess.DEVNULL)
        yield Path(folder)


def run(way: str, base: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A way in a process of its own: its figures, or why it has none, as "stopped", or as "failed" of what may pass."""
    name, slots = (BANK, way.removeprefix(BANK).strip()) if way.startswith(BANK) else (way, "1")
    command = [
        sys.executable, str(FOLDER / "bank_ways.py"), name, "--base", str(base), "--slots", slots,
        "--steps", str(options.steps), "--warmup", str(options.warmup),
    ]  # fmt: skip
    if way == GRAPH and not torch.cuda.is_available():
        return {"stopped": "not measured here: a CUDA graph needs a GPU"}
    try:
        command += ["--started", str(time.time())]
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {options.limit:g} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"failed": f"ended with {done.returncode}: {lines[-1][:500] if lines else 'no word'}"}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What all of a file was measured with."""
    return {
        "base": RANDOM if options.base is None else options.base.name,
        "recipe": RECIPE, "steps of an adapter": recipe()["steps"], "samples of a step": SAMPLES,
        "adapters of the corpus": CORPUS, "timed steps of a process": options.steps, "warm-up steps": options.warmup,
    }  # fmt: skip


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the file lacks, and write it after every process."""
    wanted = settings(options)
    report: dict[str, Any] = {**circumstances(FOLDER), **wanted, "measured": {}, "stopped": {}, "failed": {}}
    if options.out.exists():
        report = json.loads(options.out.read_text(encoding="utf-8"))
        if changed := [name for name, value in wanted.items() if report[name] != value]:
            raise SystemExit(f"{options.out} was measured with another {changed[0]}: give another --out")
    report["failed"] = {}
    ways = [STOCK, EAGER, GRAPH, *(f"{BANK} {count}" for count in options.slots)]
    turns = [(n, way) for n in range(options.rounds) for way in (ways if n % 2 == 0 else ways[::-1])]
    missing = [(n, way) for n, way in turns if way not in report["stopped"]
               and len(report["measured"].get(way, ())) <= n]  # fmt: skip
    with base_of(options) if missing else contextlib.nullcontext(Path()) as base:
        for number, way in missing:
            if way in report["stopped"] or way in report["failed"]:
                continue
            found = run(way, base, options)
            for kind in ("stopped", "failed"):
                if kind in found:
                    report[kind][way] = found[kind]
            if "device" in found:
                if (device := report.setdefault("device", found["device"])) != found["device"]:
                    raise SystemExit(f"{options.out} was measured on {device}: give another --out")
                report["measured"].setdefault(way, []).append(found)
            report["summary"] = summary(report)
            atomic.write_text(options.out, json.dumps(report, indent=1) + "\n")
            said = f"{1e3 * found['seconds per step']:.1f} ms a step" if "device" in found else json.dumps(found)
            print(f"round {number + 1}, {way}: {said}", file=sys.stderr, flush=True)
    return report


# ---- what follows ---------------------------------------------------------------------------------


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """Hours of the corpus by each way that was measured, and how far they are from the limit; all extrapolated."""
    measured: Mapping[str, list[dict[str, Any]]] = report["measured"]
    steps, rate = report["steps of an adapter"], PEAKS["H200"][0]
    counted = [found["FLOP per step"] for rounds in measured.values() for found in rounds if "FLOP per step" in found]
    limit = CORPUS * steps * counted[0] / rate / 3600 if counted else None
    ways = {way: extrapolated(way, found, steps) for way, found in measured.items()}
    for found in ways.values():
        hours = found["extrapolated GPU-hours of the corpus"]
        found["times the limit"] = None if limit is None else short(hours / limit)
        if STOCK in ways:
            found["gain over stock"] = short(ways[STOCK]["extrapolated GPU-hours of the corpus"] / hours)
    return {
        "extrapolated": f"from the timed steps of each way to {steps} steps of an adapter and {CORPUS} adapters",
        "limit, modelled": {
            "FLOP per adapter's step, counted": counted[0] if counted else None, "FLOP/s of an H200 in bf16": rate,
            "GPU-hours": None if limit is None else short(limit),
        },
        "target seconds per adapter": TARGET,
        "ways": ways,
    }  # fmt: skip


def extrapolated(way: str, rounds: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Figures of a way from its rounds."""
    slots = rounds[0]["slots"]
    step = statistics.mean(found["seconds per step"] for found in rounds)
    start = statistics.mean(found["start-up seconds"] for found in rounds)
    paid = start if way == STOCK else 0.0
    seconds = steps * step / slots + paid
    hours = CORPUS * seconds / 3600
    return {
        "timed steps": sum(found["timed steps"] for found in rounds),
        "seconds per step": short(step), "seconds per adapter's step": short(step / slots),
        "start-up seconds": short(start),
        "peak GB": max(found["peak GB"] for found in rounds),
        "extrapolated seconds per adapter": short(seconds), "extrapolated adapters per hour": short(3600 / seconds),
        "extrapolated GPU-hours of the corpus": short(hours), "target reached": seconds <= TARGET,
        "where those hours go": spent(rounds[-1], step, hours, paid / seconds),
    }  # fmt: skip


def spent(found: Mapping[str, Any], step: float, hours: float, starting: float) -> dict[str, float]:
    """A way's hours by what the GPU did in them; nothing where no profile was made.

    Args:
        found: Has the profile, whose kernels are held against steps that were not profiled.
        step: Seconds of such a step.
        starting: Share of the hours that is start-up.
    """
    profile = found["profile"]
    if not profile.get("shares"):
        return {}
    stepping = hours * (1 - starting)
    busy = min(1.0, profile["busy ms per step"] / 1e3 / step)
    parts = {kind: stepping * busy * share for kind, share in profile["shares"].items()}
    parts |= {"idle": stepping * (1 - busy), "start-up": hours * starting}
    return {kind: short(part) for kind, part in parts.items()}


def short(value: float) -> float:
    """Five digits."""
    return float(f"{value:.5g}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 8, 32, 64], help="adapters of each bank")
    parser.add_argument("--steps", type=int, default=50, help="timed in each process")
    parser.add_argument("--warmup", type=int, default=5, help="steps before those")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=float, default=900, help="seconds that a process may take")
    parser.add_argument("--base", type=Path, help="a diffusers directory of SD1.x")
    parser.add_argument("--folder", type=Path, help="where the temporary base is written")
    options = parser.parse_args()
    if min(options.steps, options.warmup, options.rounds, *options.slots) < 1:
        parser.error("--steps, --warmup, --rounds and --slots are at least 1")
    if options.base is None and not torch.cuda.is_available():
        print("a base of real size needs a GPU; --base DIR with a small one checks this file on a CPU", file=sys.stderr)
        return 2
    print(json.dumps(measure(options).get("summary", {}), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
