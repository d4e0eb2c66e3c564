"""Where a training step's time goes: by phase, by part and kind of layer, by operator.

Some steps pass first (compilation, caches), then some are timed by stamps at the borders of phases and layers, and only
then some are traced by torch's profiler, which slows them.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lit_personalize import atomic
from lit_personalize.report.layer_times import Clock, LayerTimes, blocks_of, kinds_of

PHASES = ("data", "forward", "backward", "optimizer")


class StepProfile(Callback):
    """Pass over `skip` steps, time `timed`, trace `traced`.

    Args:
        trace: Where the Chrome trace goes (`.json.gz`; for chrome://tracing or Perfetto).
    """

    def __init__(self, trace: Path, skip: int = 3, timed: int = 10, traced: int = 2):
        self.trace, self.skip, self.timed, self.traced = trace, skip, timed, traced
        self.report: dict[str, Any] = {}
        """What was measured; times are milliseconds a step. There at the end of the training."""
        self._step = 0
        self._at: dict[str, Any] = {}
        self._phases: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._whole: list[tuple[Any, Any]] = []
        self._profile: Any = None

    @property
    def steps(self) -> int:
        """Of the whole measurement."""
        return self.skip + self.timed + self.traced

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Watch the UNet's layers."""
        unet = pl_module.built.unet
        self._clock = Clock(pl_module.device)
        groups = {"parts": blocks_of(unet), "kinds": kinds_of(unet)}
        self._watched = {name: LayerTimes(layers, self._clock) for name, layers in groups.items()}
        self._at["end"] = self._clock.stamp()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A step begins; what passed since the last one was waiting for data."""
        timing = self.skip <= self._step < self.skip + self.timed
        for times in self._watched.values():
            times.active = timing
        self._begun = self._at["end"]
        self._passed("data", "end", "start")
        if self._step == self.skip + self.timed:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._clock.cuda else [])]
            self._profile = profile(activities=activities)
            self._profile.__enter__()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
        """The loss is there."""
        self._passed("forward", "start", "loss")
        for times in self._watched.values():
            times.in_backward = True

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The gradients are there."""
        self._passed("backward", "loss", "gradients")
        for times in self._watched.values():
            times.finish_backward()
            times.in_backward = False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The step is over."""
        self._passed("optimizer", "gradients", "end")
        if self.skip <= self._step < self.skip + self.timed:
            self._whole.append((self._begun, self._at["end"]))
        self._step += 1
        if self._profile is not None and self._step == self.steps:
            if self._clock.cuda:
                torch.cuda.synchronize()
            self._profile.__exit__(None, None, None)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Put everything together and write the trace."""
        for times in self._watched.values():
            times.remove()
        whole = [self._clock.between(*pair) for pair in self._whole]
        cuts = statistics.quantiles(whole, n=10)
        operators, busy = self._operators()
        launch_bound = None if busy is None else bool(busy < 0.8 * statistics.median(whole))
        self.report = {
            "device": torch.cuda.get_device_name() if self._clock.cuda else "CPU",
            "steps": self.timed,
            "step_ms": {"median": statistics.median(whole), "p10": cuts[0], "p90": cuts[-1]},
            "phases_ms": {name: self._mean(self._phases[name]) for name in PHASES},
            "parts": self._watched["parts"].totals(self.timed),
            "kinds": self._watched["kinds"].totals(self.timed),
            "operators": operators,
            "gpu_busy_ms": busy,
            "launch_bound": launch_bound,
        }
        with atomic.replacing(self.trace) as temporary:
            self._profile.export_chrome_trace(str(temporary))

    # ---- parts ------------------------------------------------------------------------------------

    def _passed(self, phase: str, begin: str, end: str) -> None:
        self._at[end] = self._clock.stamp()
        if self.skip <= self._step < self.skip + self.timed:
            self._phases[phase].append((self._at[begin], self._at[end]))

    def _mean(self, pairs: list[tuple[Any, Any]]) -> float:
        return sum(self._clock.between(*pair) for pair in pairs) / self.timed

    def _operators(self) -> tuple[list[dict[str, Any]], float | None]:
        """Operators by their own time a traced step, and how long the GPU was busy; None on a CPU."""
        cuda = self._clock.cuda
        rows, own = operators_of(self._profile.key_averages(), self.traced, cuda)
        return rows, own if cuda else None


def operators_of(events: Iterable[Any], steps: int, cuda: bool) -> tuple[list[dict[str, Any]], float]:
    """Operators by their own milliseconds a step, of the GPU if `cuda`, and their sum.

    The profiler gives a kernel's time twice, to the operator that launched it and to the kernel: operators count.
    """
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    chosen = [event for event in events if event.device_type == DeviceType.CPU and getattr(event, field) > 0]
    own = sum(getattr(event, field) for event in chosen)
    rows = [
        {
            "name": event.key,
            "calls": event.count / steps,
            "own_ms": getattr(event, field) / 1000 / steps,
            "share": getattr(event, field) / own,
        }
        for event in sorted(chosen, key=lambda event: -getattr(event, field))
    ]
    return rows, own / 1000 / steps
