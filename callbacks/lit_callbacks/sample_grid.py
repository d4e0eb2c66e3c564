"""Pictures of fixed prompts and seeds while training goes on: a directory per step and one grid over all steps."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image

from lit_callbacks import picture_grid
from lit_callbacks.adapter_ema import AdapterEma
from lit_personalize import atomic, strategies
from lit_personalize.errors import UsageError
from lit_personalize.sampling.sampler import SamplingOptions, generate

log = logging.getLogger(__name__)
RECORD = "samples.json"
"""Written last into a step's directory: prompts, seeds and options of its pictures."""
BLACK = 8
"""A picture without any value above this (of 255) is black."""


class SampleGrid(Callback):
    """Draw the same prompts with the same seeds every `every` optimizer steps.

    Sampling never ends training: running out of memory is tried again picture by picture, and whatever still fails
    is logged with its reason. The grid is made from the files on disk, so a resumed run keeps its earlier columns.

    Args:
        folder: `samples/` of the run.
        prompts: One row each.
        seeds: One picture each, side by side within a cell.
        every: Optimizer steps between two columns.
        at_start: Draw step 0 too.
        steps: Denoising steps.
        guidance: Classifier-free guidance scale; 1 is off.
        negative: The unconditional prompt.
        scheduler: "ddim", "dpm" or "euler".
        batch_size: Pictures drawn at once; does not change them.
        resolution: Side in pixels; None is the base's.
        use_average: Draw with the moving average of the adapters where the run keeps one.
    """

    def __init__(
        self,
        folder: Path | str,
        prompts: Sequence[str],
        seeds: Sequence[int] = (0, 1),
        every: int = 250,
        at_start: bool = True,
        steps: int = 25,
        guidance: float = 6.0,
        negative: str = "",
        scheduler: str = "ddim",
        batch_size: int = 8,
        resolution: int | None = None,
        use_average: bool = True,
    ):
        if not prompts or not seeds or every < 1:
            raise UsageError("the sample grid needs at least one prompt, one seed and every >= 1")
        self.folder = Path(folder)
        self.prompts = list(prompts)
        self.seeds = list(seeds)
        self.every = every
        self.at_start = at_start
        self.options = SamplingOptions(steps, guidance, negative, scheduler, batch_size)  # type: ignore[arg-type]
        self.resolution = resolution
        self.use_average = use_average
        self.failures = 0
        """Columns that could not be drawn, in the whole run."""
        self._boundary = 0

    # ---- hooks ------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what the base makes of the prompts before any training."""
        self._boundary = trainer.global_step
        if trainer.global_step == 0 and self.at_start:
            self.draw(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw a column when one is due, and at the last step."""
        step = trainer.global_step
        if step != self._boundary and (step % self.every == 0 or step == trainer.max_steps):
            self.draw(trainer, pl_module)
        self._boundary = step

    def state_dict(self) -> dict[str, Any]:
        return {"failures": self.failures}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.failures = state_dict["failures"]

    # ---- drawing ----------------------------------------------------------------------------------

    def draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw, write and log the column of the present step; failures are logged, never raised."""
        if not (trainer.is_global_zero or strategies.draws_together(trainer.strategy)):
            return
        step = trainer.global_step
        try:
            with strategies.whole(trainer):
                pictures = self._generate(trainer, pl_module)
            if not trainer.is_global_zero:
                return
            self._warn_of_black(pictures, step)
            self._write(pictures, step)
            grid = self.assemble()
            self._to_loggers(trainer, grid, step)
        except Exception as error:  # noqa: BLE001 - no failure of sampling may cost a training
            self.failures += 1
            reason = "out of memory" if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) else repr(error)
            log.warning("step %d: no samples drawn (%s); training goes on", step, reason)
            _free_memory()

    def _generate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> np.ndarray:
        prompts = [prompt for prompt in self.prompts for _ in self.seeds]
        seeds = self.seeds * len(self.prompts)
        ema = next((c for c in trainer.callbacks if isinstance(c, AdapterEma)), None)  # type: ignore[attr-defined]
        base: Any = pl_module.built
        adapters = list(pl_module.adapters)  # type: ignore[arg-type]
        with ema.averaged(pl_module) if ema and self.use_average else nullcontext():
            try:
                return generate(base, prompts, seeds, adapters, self.options, self.resolution)
            except torch.cuda.OutOfMemoryError:
                if self.options.batch_size == 1:
                    raise
                _free_memory()
                self.options = replace(self.options, batch_size=1)
                log.warning(
                    "step %d: out of memory while sampling; from now on one picture at a time", trainer.global_step
                )
                return generate(base, prompts, seeds, adapters, self.options, self.resolution)

    def _warn_of_black(self, pictures: np.ndarray, step: int) -> None:
        if black := [i for i, picture in enumerate(pictures) if picture.max() <= BLACK]:
            log.warning(
                "step %d: %d of %d samples are black (first: %r): NaN in the adapters or an overflowing VAE; "
                "try vae_dtype: float32",
                step, len(black), len(pictures), self.prompts[black[0] // len(self.seeds)],
            )  # fmt: skip

    def _write(self, pictures: np.ndarray, step: int) -> None:
        folder = self.folder / f"step-{step:08d}"
        names = [f"{row}_{seed}.png" for row in range(len(self.prompts)) for seed in self.seeds]
        for name, picture in zip(names, pictures, strict=True):
            atomic.write_bytes(folder / name, _png(Image.fromarray(picture)))
        record = {"step": step, **self._asked(), "pictures": names, "options": asdict(self.options)}
        atomic.write_text(folder / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    def _asked(self) -> dict[str, Any]:
        return {"prompts": self.prompts, "seeds": self.seeds}

    def assemble(self) -> Image.Image:
        """Make `grid.png` of the columns on disk that show these prompts and seeds."""
        columns = []
        for path in sorted(self.folder.glob(f"step-*/{RECORD}"), key=lambda p: int(p.parent.name.split("-")[1])):
            record = json.loads(path.read_text(encoding="utf-8"))
            if {key: record[key] for key in ("prompts", "seeds")} == self._asked():
                columns.append((record["step"], [path.parent / name for name in record["pictures"]]))
        grid = picture_grid.assemble(self.prompts, len(self.seeds), picture_grid.thin(columns))
        atomic.write_bytes(self.folder / "grid.png", _png(grid))
        return grid

    def _to_loggers(self, trainer: pl.Trainer, grid: Image.Image, step: int) -> None:
        for logger in trainer.loggers:
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(experiment, "add_image"):
                experiment.add_image("samples", np.asarray(grid), step, dataformats="HWC")


def _png(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
