"""Adapter steps per second of a bank against the single-adapter trainer, side by side in one run, and the limit of it.

The recipe is that of Weights2Weights: LoRA of rank 1 on q and v of all attention, one instance and one prior picture a
step, on the embedded base. The trainer is that of `litp fit` in one process, with latents and text states cached,
without start-up, sampling or checkpoints: the runs of a corpus one after the other. What a bank can win over it is
what the frozen base wins per sample in a larger batch: its forward pass, and its backward pass down to the first
adapted layer, are timed at both batches in the same run. All take turns, so a machine that slows down slows all; the
results are medians of the rounds' ratios. Figures of a machine with other work on it are noisy ones.

    python benchmarks/bank_speed.py [--slots 32] [--steps 8] [--rounds 5] [--base DIR] [--clock cpu] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lit_callbacks.non_finite_guard import NonFiniteGuard
from lit_personalize.adapters.lora import LoRA
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.bank import AdapterJob, Bank, Pictures
from lit_personalize.batch import Batch
from lit_personalize.cli.console import configure_logging
from lit_personalize.fitting import quiet_lightning
from lit_personalize.objectives.prior_preservation import PriorPreservation
from lit_personalize.report.circumstances import circumstances

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
SAMPLES = 2
"""Of an adapter's step."""
WARMUP = 2
"""Steps of each that are not timed."""


def objective_of(base: str) -> PriorPreservation:
    lora = LoRA(rank=1, targets="query_value", init_seed=0)
    return PriorPreservation(base, [lora], lambda groups: torch.optim.AdamW(groups, lr=1e-4, weight_decay=1e-2))


def pictures_of(base: Base, number: int) -> Pictures:
    """Random pictures: what they show changes no time."""
    draws = torch.Generator().manual_seed(number)
    side = base.resolution

    def encoded(count: int, caption: str, prior: Pictures | None = None) -> Pictures:
        pixels = torch.rand(count, 3, side, side, generator=draws) * 2 - 1
        return Pictures.encode(base, pixels, [caption] * count, 1, prior, number)

    return encoded(4, "photo of a star", encoded(4, "photo of a circle"))


class Frozen:
    """Passes of the base alone: no gradient before the first adapted layer, none to any weight."""

    def __init__(self, base: Base):
        self.base = base
        first = next(m for name, m in base.unet.named_modules() if name.endswith("attn1.to_q"))
        first.register_forward_hook(lambda module, args, out: out.detach().requires_grad_())
        self.states = base.condition(["photo of a star"]).states

    def run(self, samples: int, clock: Callable[[], float]) -> float:
        """Seconds of one forward and backward pass."""
        side = self.base.resolution // self.base.downscale
        z = torch.randn(samples, self.base.latent_channels, side, side)
        t, states = torch.zeros(samples, dtype=torch.int64), self.states.expand(samples, -1, -1)
        started = clock()
        self.base.unet(z, t, states, return_dict=False)[0].square().sum().backward()
        return clock() - started


class Endless(torch.utils.data.IterableDataset[Batch]):
    def __init__(self, pictures: Pictures):
        self.pictures = pictures

    def __iter__(self) -> Any:
        return (self.pictures.batch_of_step(step) for step in range(1 << 30))


class TakeTurns(pl.Callback):
    """Time the trainer's steps round by round; after each round, the bank and the base have theirs."""

    def __init__(self, steps: int, others: dict[str, Callable[[], float]], clock: Callable[[], float]):
        self.steps, self.others, self.clock = steps, others, clock
        self.seconds: dict[str, list[float]] = {name: [] for name in ("trainer", *others)}
        self.round: list[float] = []
        self.started = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        done = trainer.global_step - WARMUP
        if done > 0:
            self.round.append(self.clock() - self.started)
            if done % self.steps == 0:
                self.seconds["trainer"].append(statistics.median(self.round))
                for name, run in self.others.items():
                    self.seconds[name].append(run())
                self.round = []
        self.started = self.clock()


def measure(base: str, slots: int, steps: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Seconds of each, and the ratios per adapter step."""
    bank = Bank(objective_of(base), slots)
    own = bank.objective.built
    jobs = [AdapterJob(str(n), lambda n=n: pictures_of(own, n), 1 << 30, n) for n in range(slots)]  # type: ignore[misc]
    list(bank.fill(iter(jobs)))
    frozen = Frozen(load_base(base))

    small, large = "base, the trainer's batch", "base, the bank's batch"

    def step_bank() -> float:
        started = clock()
        bank.step()
        return clock() - started

    def run_base(samples: int, times: int) -> Callable[[], float]:
        return lambda: statistics.median(frozen.run(samples, clock) for _ in range(times))

    others = {
        "bank": step_bank, large: run_base(SAMPLES * slots, 1), small: run_base(SAMPLES, steps),
    }  # fmt: skip
    for _ in range(WARMUP):
        for run in others.values():
            run()
    turns = TakeTurns(steps, others, clock)
    objective = objective_of(base)
    objective.configure_model()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=WARMUP + rounds * steps, logger=False, enable_checkpointing=False, enable_model_summary=False,
            enable_progress_bar=False, default_root_dir=folder, accelerator="cpu", callbacks=[NonFiniteGuard(), turns],
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(Endless(pictures_of(objective.built, 0)), batch_size=None)
        trainer.fit(objective, loader)
    found = turns.seconds
    pairs = zip(*(found[name] for name in ("trainer", *others)), strict=True)
    gains, limits = zip(*((alone * slots / b, few * slots / many) for alone, b, many, few in pairs), strict=True)
    shares = [gain / limit for gain, limit in zip(gains, limits, strict=True)]
    return {
        "slots": slots, "samples per adapter step": SAMPLES,
        "trainer ms per adapter step": round(1e3 * statistics.median(found["trainer"]), 2),
        "bank ms per adapter step": round(1e3 * statistics.median(found["bank"]) / slots, 2),
        "base ms per adapter step, trainer's batch": round(1e3 * statistics.median(found[small]), 2),
        "base ms per adapter step, bank's batch": round(1e3 * statistics.median(found[large]) / slots, 2),
        "ratio": round(statistics.median(gains), 3), "ratios of rounds": [round(x, 3) for x in gains],
        "limit": round(statistics.median(limits), 3), "limits of rounds": [round(x, 3) for x in limits],
        "share of the limit": round(statistics.median(shares), 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="A bank against the single-adapter trainer, side by side.")
    parser.add_argument("--base", default="tinyworld")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8, help="of the trainer in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu leaves out when other programs ran")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    configure_logging()
    quiet_lightning()
    result = circumstances(Path(__file__).parent) | {
        "base": options.base, "clock": options.clock, "load of the machine": [round(x, 1) for x in os.getloadavg()],
        "result": measure(options.base, options.slots, options.steps, options.rounds, CLOCKS[options.clock]),
    }  # fmt: skip
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
