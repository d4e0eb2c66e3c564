"""Bytes that a run writes: checkpoints, exports and pictures."""

from __future__ import annotations

from typing import Any

from lit_personalize.planning_data import Pictures
from lit_personalize.planning_memory import StepMemory

HEADER = 2**18
"""At most, of a checkpoint beside its tensors."""
LORA_FILES = ("diffusers", "kohya", "peft")


def disk_of(built: Any, step: StepMemory, pictures: Pictures, steps: int | None) -> dict[str, int]:
    """Bytes by kind, at most.

    A checkpoint has what trains, the optimizer's state and the average. Of whole changes a LoRA file has the smallest
    rank within `export.max_error`, which is not known before: counted as large as the changes.
    """
    one = step.trained * (1 if built.ema is None else 2) + (step.optimizer or 0) + HEADER
    written = max(1, -(-steps // built.checkpoint.every)) if steps else built.checkpoint.keep_last
    kept = min(built.checkpoint.keep_last, written) + 1 + bool(built.checkpoint.best)  # one while it is written
    found = {"checkpoint": one, "checkpoints": kept * one, "exports": 0}
    for name in built.export.formats:
        base = sum(size for part, size in step.base.items())
        found["exports"] += base if name == "pipeline" else step.trained
    sampling = built.sampling
    columns = (steps or 0) // sampling.every + 1
    height, width = pictures.view.shape
    found["samples"] = 3 * height * width * len(sampling.prompts) * len(sampling.seeds) * columns
    return found
