"""One resumable training loop for all parts of the embedded world.

A `Stage` trains some modules for a number of steps that a clock may shorten: the learning rate
follows the larger of step share and time share, so a run that ends early has still cooled down.
Every batch is a function of (seed, step): a resumed run sees what an undisturbed one would have.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

Log = Callable[[str], None]


@dataclass
class Stage:
    """What to train and for how long.

    Args:
        name: file name of the stage's state and final weights.
        modules: trained together; saved under their keys.
        loss: `loss(step) -> (scalar, metrics)`; draws its own batch from the step.
        steps: number of optimizer steps.
        learning_rate: peak of a schedule with linear warm-up and cosine decay to 2 %.
        seconds: wall-clock limit over all sittings of this stage, or None.
        ema: decay of the averaged weights that the stage returns, or 0 for the last ones.
    """

    name: str
    modules: dict[str, nn.Module]
    loss: Callable[[int], tuple[Tensor, dict[str, float]]]
    steps: int
    learning_rate: float
    seconds: float | None = None
    weight_decay: float = 0.01
    warmup: int = 100
    clip: float = 1.0
    ema: float = 0.0
    save_every: int = 200


def schedule(progress: float, step: int, warmup: int, floor: float = 0.02) -> float:
    """Linear warm-up, then cosine from 1 to `floor` at `progress` = 1."""
    return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def _weights(stage: Stage) -> dict[str, Tensor]:
    return {f"{key}.{name}": t for key, module in stage.modules.items() for name, t in module.state_dict().items()}


def _load(stage: Stage, tensors: dict[str, Tensor]) -> None:
    for key, module in stage.modules.items():
        module.load_state_dict({n[len(key) + 1 :]: t for n, t in tensors.items() if n.startswith(key + ".")})


def run_stage(stage: Stage, folder: Path, log: Log = print) -> dict[str, Tensor]:
    """Train until the steps or the seconds are used up; leave the modules with the final weights.

    Returns:
        The final (averaged, if `ema`) weights by `<module key>.<parameter name>`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, partial = folder / f"{stage.name}.final.pt", folder / f"{stage.name}.partial.pt"
    if final.exists():
        weights = torch.load(final, weights_only=True)
        _load(stage, weights)
        return weights
    parameters = [p for module in stage.modules.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, stage.learning_rate, (0.9, 0.99), weight_decay=stage.weight_decay)
    step, spent = 0, 0.0
    average = {k: t.clone() for k, t in _weights(stage).items()} if stage.ema else {}
    if partial.exists():
        state = torch.load(partial, weights_only=True)
        _load(stage, state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent, average = state["step"], state["spent"], state["average"]
        log(f"{stage.name}: going on from step {step}")
    for module in stage.modules.values():
        module.train()
    started, last_log = time.monotonic() - spent, step
    means: dict[str, float] = {}
    while step < stage.steps:
        elapsed = time.monotonic() - started
        progress = max(step / stage.steps, elapsed / stage.seconds if stage.seconds else 0.0)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * schedule(progress, step, stage.warmup)
        loss, metrics = stage.loss(step)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{stage.name}: loss is {loss.item()} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, stage.clip)
        optimizer.step()
        step += 1
        if stage.ema:
            decay = min(stage.ema, (1 + step) / (10 + step))
            for key, tensor in _weights(stage).items():
                if tensor.is_floating_point():
                    average[key].lerp_(tensor, 1 - decay)
        for key, value in {"loss": float(loss.detach()), **metrics}.items():
            means[key] = means.get(key, 0.0) + value
        if step % 50 == 0:
            figures = "  ".join(f"{k} {x / (step - last_log):.4f}" for k, x in means.items())
            log(f"{stage.name} {step}/{stage.steps}  {progress:4.0%}  {figures}  {elapsed / step:.2f} s/step")
            means, last_log = {}, step
        if step % stage.save_every == 0:
            state = {"weights": _weights(stage), "optimizer": optimizer.state_dict(), "step": step,
                     "spent": time.monotonic() - started, "average": average}  # fmt: skip
            temporary = partial.with_suffix(".tmp")
            torch.save(state, temporary)
            temporary.replace(partial)
    weights = {k: t.clone() for k, t in (average if stage.ema else _weights(stage)).items()}
    _load(stage, weights)
    torch.save(weights, final.with_suffix(".tmp"))
    final.with_suffix(".tmp").replace(final)
    partial.unlink(missing_ok=True)
    return weights
