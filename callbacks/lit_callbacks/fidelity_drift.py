"""Fidelity against drift: how well pictures show the subject, less how far its class has moved."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor

from lit_callbacks.adapter_ema import AdapterEma
from lit_personalize.errors import UsageError
from lit_personalize.metrics.alignment import cosines, image_alignment
from lit_personalize.metrics.features import Clip
from lit_personalize.sampling.sampler import SamplingOptions, generate

log = logging.getLogger(__name__)
METRIC = "fidelity_against_drift"


class FidelityDrift(Callback):
    """Log `fidelity`, `drift` and `fidelity_against_drift` every `every` optimizer steps.

    Fidelity is CLIP-I: the mean cosine of pictures of `prompts` with the subject's real pictures (Ruiz et al., 2022,
    sec. 4.1). Drift is one minus the mean cosine of pictures of `class_prompts` with what the untouched base draws
    from the same seeds: 0 at step 0, larger the more the class has turned into the subject. The metric is
    fidelity - `weight` · drift; `RunCheckpoint` keeps its best step.

    Args:
        references: Real pictures of the subject, uint8 `[H, W, 3]` of any size.
        prompts: Name the subject by its token.
        class_prompts: The same without the token.
        clip: Local `CLIPModel` directory.
        seeds: Pictures per prompt.
        every: Optimizer steps between two measurements; that of the checkpoints.
        weight: Of the drift.
        options: How pictures are drawn.
    """

    def __init__(
        self,
        references: Sequence[np.ndarray],
        prompts: Sequence[str],
        class_prompts: Sequence[str],
        clip: str | Path,
        seeds: Sequence[int] = (0, 1, 2, 3),
        every: int = 250,
        weight: float = 1.0,
        options: SamplingOptions | None = None,
    ):
        if not len(references) or not prompts or not class_prompts or not seeds:
            raise UsageError("fidelity against drift needs reference pictures, prompts, class prompts and seeds")
        if every < 1 or weight < 0:
            raise UsageError(f"every must be at least 1 and weight not negative, not {every} and {weight}")
        self.references = references
        self.prompts, self.class_prompts, self.seeds = list(prompts), list(class_prompts), list(seeds)
        self.every, self.weight = every, weight
        self.options = options or SamplingOptions()
        self.clip_dir = clip
        self._clip: Clip | None = None
        self._real: Tensor | None = None
        self._before: Tensor | None = None
        self._boundary = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the references and draw the class as the untouched base does."""
        self._boundary = trainer.global_step
        if not trainer.is_global_zero or self._real is not None:
            return
        base: Any = pl_module.built
        self._clip = Clip(self.clip_dir)
        self._real = self._clip.images(self._reference_pixels(base.resolution))
        self._before = self._clip.images(self._draw(base, self.class_prompts, []))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure when due, and at the last step; a failure is logged and costs only the measurement."""
        step = trainer.global_step
        due = step != self._boundary and (step % self.every == 0 or step == trainer.max_steps)
        self._boundary = step
        if not due:
            return
        values = {name: float("nan") for name in ("fidelity", "drift", METRIC)}
        if trainer.is_global_zero:
            try:
                values = self.measure(trainer, pl_module)
                log.info("step %d: %s", step, ", ".join(f"{k} {v:.3f}" for k, v in values.items()))
            except Exception as error:  # noqa: BLE001 - no failure of sampling may cost a training
                log.warning("step %d: fidelity and drift not measured (%r); training goes on", step, error)
        for name, value in trainer.strategy.broadcast(values).items():
            pl_module.log(name, value, batch_size=1)

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """The three figures of the present weights, averaged ones where the run keeps them."""
        if self._clip is None or self._real is None or self._before is None:
            raise RuntimeError("FidelityDrift.measure before the start of training: nothing to compare with")
        ema = next((c for c in trainer.callbacks if isinstance(c, AdapterEma)), None)  # type: ignore[attr-defined]
        base: Any = pl_module.built
        adapters = list(pl_module.adapters)  # type: ignore[arg-type]
        with ema.averaged(pl_module) if ema else nullcontext():
            own = self._clip.images(self._draw(base, self.prompts, adapters))
            after = self._clip.images(self._draw(base, self.class_prompts, adapters))
        fidelity = image_alignment(own, self._real)
        drift = 1 - float(cosines(after, self._before).diagonal().mean())
        return {"fidelity": fidelity, "drift": drift, METRIC: fidelity - self.weight * drift}

    def _draw(self, base: Any, prompts: Sequence[str], adapters: list[Any]) -> np.ndarray:
        asked = [prompt for prompt in prompts for _ in self.seeds]
        return generate(base, asked, self.seeds * len(prompts), adapters, self.options)

    def _reference_pixels(self, side: int) -> np.ndarray:
        pictures = [Image.fromarray(picture) for picture in self.references]
        return np.stack([np.asarray(p.resize((side, side), Image.Resampling.BICUBIC)) for p in pictures])
