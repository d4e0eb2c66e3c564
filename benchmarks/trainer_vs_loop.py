"""Steps per second of the trainer against a bare hand-written PyTorch + PEFT loop, side by side in one run.

Both train the same rank-4 LoRA on the embedded base, with the same loader, cached latents and draws of the same
size; the trainer has the callbacks that every fit has. No sampling and no checkpoint in the timed part. They take
turns, some steps each, inside one fit: so a machine that slows down slows both. Every step is timed; the result is the
median over the rounds of the ratio of the two median steps.

    python benchmarks/trainer_vs_loop.py [--steps 20] [--rounds 25] [--base DIR] [--clock cpu] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lit_callbacks.non_finite_guard import NonFiniteGuard
from lit_callbacks.progress import Progress
from lit_callbacks.run_checkpoint import RunCheckpoint
from lit_callbacks.throughput import Throughput
from lit_datamodules.personalization import Concept, PersonalizationData
from lit_personalize.adapters.lora import LoRA
from lit_personalize.backbones.loading import load_base, parts_of
from lit_personalize.cli.console import configure_logging
from lit_personalize.fitting import quiet_lightning
from lit_personalize.objectives.denoising import Denoising
from lit_personalize.report.circumstances import circumstances
from lit_personalize.tinyworld.dataset import sample_pictures, write_folder

CAPTION = "a photo of a star"
BATCHES = (1, 4)
ASKED = 0.95
"""Of the loop's steps per second, at least."""
WARMUP = 5
"""Steps of each that are not timed."""
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Loop:
    """What one writes by hand: PEFT in the UNet, AdamW, global noise, states of the caption encoded before."""

    def __init__(self, photos: Path, source: str, batch: int):
        from peft import LoraConfig, inject_adapter_in_model

        parts = parts_of(source)
        text_encoder = parts["text_encoders"][0]
        self.unet, self.scheduler = parts["unet"], parts["scheduler"]
        for module in (self.unet, text_encoder, parts["vae"]):
            module.requires_grad_(False)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        lora = LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets)
        inject_adapter_in_model(lora, self.unet)
        self.optimizer = torch.optim.AdamW([p for p in self.unet.parameters() if p.requires_grad], lr=1e-3)
        ids = parts["tokenizers"][0](CAPTION, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            self.states = text_encoder(ids).last_hidden_state.expand(batch, -1, -1)
        self.scaling = parts["vae"].config.scaling_factor
        data = data_of(photos, load_base(source), batch)
        data.setup("fit")
        loader = data.train_dataloader()
        loader.steps_per_epoch = 1_000_000  # one long epoch, as the trainer has
        self.batches = iter(loader)

    def run(self, steps: int, clock: Callable[[], float]) -> float:
        """Train `steps` steps; the median of their seconds."""
        predicts_v = self.scheduler.config.prediction_type == "v_prediction"
        seconds = []
        for _ in range(steps):
            started = clock()
            b = next(self.batches)
            z = b["latent_mean"] + b["latent_std"] * torch.randn_like(b["latent_mean"])
            z = z * self.scaling
            noise, t = torch.randn_like(z), torch.randint(0, 1000, (len(z),))
            prediction = self.unet(self.scheduler.add_noise(z, noise, t), t, self.states).sample
            target = self.scheduler.get_velocity(z, noise, t) if predicts_v else noise
            loss = torch.nn.functional.mse_loss(prediction, target)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            loss.item()
            seconds.append(clock() - started)
        return statistics.median(seconds)


class TakeTurns(pl.Callback):
    """Time the trainer's steps round by round; after each round, the loop has its own, timed alike."""

    def __init__(self, loop: Loop, steps: int, clock: Callable[[], float]):
        self.loop, self.steps, self.clock = loop, steps, clock
        self.trainer_seconds: list[float] = []
        self.loop_seconds: list[float] = []
        self.round: list[float] = []
        self.started = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        done = trainer.global_step - WARMUP
        if done == 0:
            self.loop.run(WARMUP, self.clock)
        elif done > 0:
            self.round.append(self.clock() - self.started)  # from batch end to batch end, all callbacks included
            if done % self.steps == 0:
                self.trainer_seconds.append(statistics.median(self.round))
                self.loop_seconds.append(self.loop.run(self.steps, self.clock))
                self.round = []
        self.started = self.clock()


def data_of(photos: Path, base: Any, batch: int) -> PersonalizationData:
    concept = Concept(str(photos), "star", prompt=CAPTION, captions="prompt")
    data = PersonalizationData([concept], resolution=64, batch_size=batch, cache_latents=True)
    data.bind(base, base)
    return data


def measure(photos: Path, source: str, batch: int, steps: int, rounds: int, clock: str) -> dict[str, Any]:
    """Medians and their ratio at one batch size."""
    objective = Denoising(source, [LoRA(rank=4)])
    objective.configure_model()
    turns = TakeTurns(Loop(photos, source, batch), steps, CLOCKS[clock])
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=WARMUP + rounds * steps, logger=False, enable_checkpointing=False,
            enable_model_summary=False, default_root_dir=folder, accelerator="cpu",
            callbacks=[NonFiniteGuard(), Throughput(), Progress(), RunCheckpoint(Path(folder), every=10**9), turns],
        )  # fmt: skip
        trainer.fit(objective, datamodule=data_of(photos, objective.built, batch))
    pairs = zip(turns.loop_seconds, turns.trainer_seconds, strict=True)
    ratios = sorted(loop / ours for loop, ours in pairs)
    ratio = statistics.median(ratios)
    return {
        "trainer ms per step": round(1e3 * statistics.median(turns.trainer_seconds), 2),
        "loop ms per step": round(1e3 * statistics.median(turns.loop_seconds), 2),
        "ratio": round(ratio, 3),
        "ratios of rounds": [round(r, 3) for r in ratios],
        "reached": ratio >= ASKED,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Trainer against a bare loop, side by side.")
    parser.add_argument("--base", default="tinyworld")
    parser.add_argument("--steps", type=int, default=20, help="of each in a round")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: seconds of all threads")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    configure_logging()
    quiet_lightning()
    results = circumstances(Path(__file__).parent) | {
        "base": options.base, "clock": options.clock, "steps per round": options.steps, "rounds": options.rounds,
        "asked ratio": ASKED,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        write_folder(sample_pictures(5, 0, kind="object"), photos)
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
