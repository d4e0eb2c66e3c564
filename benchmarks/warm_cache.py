"""How many times faster a training step is where latents and text states are kept, side by side in one run.

Two trainings of the same LoRA on the embedded base, with the callbacks that every fit has, take turns, some steps each:
one encodes its pictures at every step (`cache_latents: false`), the other has a filled `cache_dir`. Text states are
encoded once per caption and process in both; that first encoding is timed apart. The result is the median over the
rounds of the ratio of the two median steps.

    python benchmarks/warm_cache.py [--steps 10] [--rounds 15] [--clock cpu] [--base DIR] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lit_callbacks.non_finite_guard import NonFiniteGuard
from lit_callbacks.progress import Progress
from lit_callbacks.run_checkpoint import RunCheckpoint
from lit_callbacks.throughput import Throughput
from lit_datamodules.personalization import Concept, PersonalizationData
from lit_personalize.adapters.lora import LoRA
from lit_personalize.cli.console import configure_logging
from lit_personalize.fitting import quiet_lightning
from lit_personalize.objectives.denoising import Denoising
from lit_personalize.report.circumstances import circumstances
from lit_personalize.tinyworld.dataset import sample_pictures, write_folder

BATCHES = (1, 4)
PICTURES = 16
WARMUP = 3
"""Steps of each that are not timed."""
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Turns:
    """Lets one of two threads run at a time, and hands over when told."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.turn = 0

    def wait(self, number: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.turn in (number, -1))

    def hand_over(self, to: int) -> None:
        with self.changed:
            self.turn = to
            self.changed.notify_all()


class TakeTurns(pl.Callback):
    """Time the steps of one training round by round; between two rounds the other one has its turn."""

    def __init__(self, turns: Turns, number: int, steps: int, clock: Callable[[], float]):
        self.turns, self.number, self.steps, self.clock = turns, number, steps, clock
        self.seconds: list[float] = []
        self.round: list[float] = []
        self.started = 0.0

    def on_train_start(self, *_: Any) -> None:
        self.turns.wait(self.number)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        done = trainer.global_step - WARMUP
        if done > 0:
            self.round.append(self.clock() - self.started)  # from batch end to batch end, all callbacks included
        if done >= 0 and done % self.steps == 0:
            if self.round:
                self.seconds.append(statistics.median(self.round))
            self.round = []
            self.turns.hand_over(1 - self.number)
            self.turns.wait(self.number)
        self.started = self.clock()

    def on_train_end(self, *_: Any) -> None:
        self.turns.hand_over(-1)  # whoever is left need not wait any more

    def on_exception(self, *_: Any) -> None:
        self.turns.hand_over(-1)


def training(photos: Path, source: str, batch: int, cache: Path | None) -> tuple[Denoising, PersonalizationData]:
    """An objective and its data, with a filled cache or without any."""
    objective = Denoising(source, [LoRA(rank=4)])
    objective.configure_model()
    data = PersonalizationData(
        [Concept(str(photos), "star")], batch_size=batch, cache_latents=cache is not None,
        cache_dir=str(cache) if cache else None,
    )  # fmt: skip
    data.bind(objective.built, objective.built)
    data.setup("fit")
    if data.text_store is not None:
        objective.keep_states(data.captions, data.text_store)
    return objective, data


def measure(photos: Path, source: str, batch: int, steps: int, rounds: int, clock: str) -> dict[str, Any]:
    """Medians and their ratio at one batch size."""
    turns, watches, threads = Turns(), [], []
    errors: list[BaseException] = []
    with tempfile.TemporaryDirectory() as folder:
        training(photos, source, batch, Path(folder, "cache"))  # fills it
        for number, cache in enumerate((None, Path(folder, "cache"))):
            objective, data = training(photos, source, batch, cache)
            if cache is not None and data.cache is not None and data.cache.misses:
                raise RuntimeError("the cache is not warm")
            watch = TakeTurns(turns, number, steps, CLOCKS[clock])
            callbacks = [NonFiniteGuard(), Throughput(), Progress(plain_every=0),
                         RunCheckpoint(Path(folder, str(number)), every=10**9), watch]  # fmt: skip
            trainer = pl.Trainer(
                max_steps=WARMUP + rounds * steps, logger=False, enable_checkpointing=False,
                enable_model_summary=False, default_root_dir=folder, accelerator="cpu", callbacks=callbacks,
            )  # fmt: skip

            def run(trainer: pl.Trainer = trainer, objective: Any = objective, data: Any = data) -> None:
                try:
                    trainer.fit(objective, datamodule=data)
                except BaseException as error:  # noqa: BLE001 - it is raised below, by the main thread
                    errors.append(error)

            watches.append(watch)
            threads.append(threading.Thread(target=run))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    cold, warm = (watch.seconds for watch in watches)
    ratios = sorted(a / b for a, b in zip(cold, warm, strict=True))
    return {
        "cold ms per step": round(1e3 * statistics.median(cold), 2),
        "warm ms per step": round(1e3 * statistics.median(warm), 2),
        "ratio": round(statistics.median(ratios), 2),
        "ratios of rounds": [round(r, 2) for r in ratios],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Training steps with a warm cache against steps without.")
    parser.add_argument("--base", default="tinyworld")
    parser.add_argument("--steps", type=int, default=10, help="of each in a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: seconds of all threads")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    configure_logging()
    quiet_lightning()
    results = circumstances(Path(__file__).parent) | {
        "base": options.base, "clock": options.clock, "steps per round": options.steps, "rounds": options.rounds
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        write_folder(sample_pictures(PICTURES, 0, kind="object"), photos)
        for batch in BATCHES:
            results[f"batch {batch}"] = measure(
                photos, options.base, batch, options.steps, options.rounds, options.clock
            )
    text = json.dumps(results, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
