"""Steps per second of the trainer against a bare hand-written PyTorch + PEFT loop, side by side in one run.

Both train the same rank-4 LoRA on the embedded base, with the same loader, cached latents and draws of
the same size, no sampling and no checkpoint in the timed part. Rounds alternate, so that a busy machine
slows both; the ratio of medians is the result.

    python benchmarks/trainer_vs_loop.py [--steps 60] [--rounds 3] [--base DIR]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lit_callbacks.non_finite_guard import NonFiniteGuard
from lit_callbacks.throughput import Throughput
from lit_datamodules.personalization import Concept, PersonalizationData
from lit_personalize.adapters.lora import LoRA
from lit_personalize.backbones.loading import load_base, parts_of
from lit_personalize.cli.console import configure_logging
from lit_personalize.fitting import _quiet_lightning
from lit_personalize.objectives.denoising import Denoising
from lit_personalize.tinyworld.dataset import sample_pictures, write_folder

CAPTION = "a photo of a star"


class Clock(pl.Callback):
    """Time from the end of the warm-up step to the end of the last."""

    def __init__(self, warmup: int):
        self.warmup = warmup
        self.started = self.ended = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.warmup:
            self.started = time.perf_counter()
        self.ended = time.perf_counter()


def data_of(photos: Path, base: Any, batch: int, steps: int) -> PersonalizationData:
    concept = Concept(str(photos), "star", prompt=CAPTION, captions="prompt")
    data = PersonalizationData([concept], resolution=64, batch_size=batch, cache_latents=True)
    data.bind(base, base)
    return data


def trainer_rate(photos: Path, source: str, batch: int, steps: int, warmup: int) -> float:
    objective = Denoising(source, [LoRA(rank=4)])
    objective.configure_model()
    clock = Clock(warmup)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=steps + warmup, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder, accelerator="cpu",
            callbacks=[NonFiniteGuard(), Throughput(), clock],
        )  # fmt: skip
        trainer.fit(objective, datamodule=data_of(photos, objective.built, batch, steps + warmup))
    return steps / (clock.ended - clock.started)


def loop_rate(photos: Path, source: str, batch: int, steps: int, warmup: int) -> float:
    """What one writes by hand: PEFT in the UNet, AdamW, global noise."""
    from peft import LoraConfig, inject_adapter_in_model

    parts = parts_of(source)
    unet, text_encoder, scheduler = parts["unet"], parts["text_encoders"][0], parts["scheduler"]
    for module in (unet, text_encoder, parts["vae"]):
        module.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets), unet)
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    data = data_of(photos, load_base(source), batch, steps)
    data.setup("fit")
    ids = parts["tokenizers"][0](CAPTION, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        states = text_encoder(ids).last_hidden_state
    predicts_v = scheduler.config.prediction_type == "v_prediction"
    started = 0.0
    for step in range(steps + warmup):
        if step == warmup:
            started = time.perf_counter()
        b = data.batch_of_step(step)
        z = b["latent_mean"] + b["latent_std"] * torch.randn_like(b["latent_mean"])
        z = z * parts["vae"].config.scaling_factor
        noise, t = torch.randn_like(z), torch.randint(0, 1000, (len(z),))
        prediction = unet(scheduler.add_noise(z, noise, t), t, states.expand(len(z), -1, -1)).sample
        target = scheduler.get_velocity(z, noise, t) if predicts_v else noise
        loss = torch.nn.functional.mse_loss(prediction, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
    return steps / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trainer against a bare loop, side by side.")
    parser.add_argument("--base", default="tinyworld")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    configure_logging()
    _quiet_lightning()
    results: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "steps": options.steps}
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        write_folder(sample_pictures(5, 0, kind="object"), photos)
        for batch in (1, 4):
            ours, bare = [], []
            for _ in range(options.rounds):
                bare.append(loop_rate(photos, options.base, batch, options.steps, 5))
                ours.append(trainer_rate(photos, options.base, batch, options.steps, 5))
            results[f"batch {batch}"] = {
                "trainer steps/s": round(statistics.median(ours), 3),
                "loop steps/s": round(statistics.median(bare), 3),
                "ratio": round(statistics.median(ours) / statistics.median(bare), 3),
            }
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
