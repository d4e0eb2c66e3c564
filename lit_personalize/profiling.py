"""Train some steps of a configuration for real: `litp profile step` says where their time goes, `litp plan` how long.

Nothing of the run is touched but its folder `profile/`: `step.json`, `step.png` and `trace.json.gz`.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace

from lit_personalize import atomic
from lit_personalize.configuration import instantiate, parse
from lit_personalize.errors import UsageError
from lit_personalize.fitting import name_initial_words, prepare_data, quiet_lightning
from lit_personalize.ranks import is_rank_zero
from lit_personalize.run_directory import RunDirectory

ROWS = 12
"""Of operators, in the table and the picture."""


def profile_step(arguments: Sequence[str], steps: int = 10) -> tuple[dict[str, Any], Path]:
    """Measure `steps` steps; `arguments` are those of `litp fit`.

    Returns:
        The report of `lit_callbacks.step_profile.StepProfile`, and the folder with the files.

    Raises:
        UsageError: The configuration.
        DataError: An input.
        KeyboardInterrupt: Nothing is written then.
    """
    from lit_callbacks.step_profile import StepProfile

    _, config = parse(arguments)
    folder = RunDirectory(config.root, config.name).path / "profile"
    with tempfile.TemporaryDirectory() as scratch:
        watcher = StepProfile((folder if is_rank_zero() else Path(scratch)) / "trace.json.gz", timed=steps)
        longest = watcher.steps * config.trainer.accumulate_grad_batches
        built = _train_briefly(arguments, Path(scratch), watcher, longest)
    report = {"run": config.name, "kernels": built.model.kernels, **watcher.report}
    if is_rank_zero():
        atomic.write_text(folder / "step.json", json.dumps(report, indent=1) + "\n")
        with atomic.replacing(folder / "step.png") as temporary:
            draw(report, temporary)
    return report, folder


def time_steps(arguments: Sequence[str], steps: int) -> dict[str, Any]:
    """Train `steps` steps on one device of this machine, in a place that is removed.

    Returns:
        Device, seconds of the start and of the first step, and the median of the further optimizer steps.

    Raises:
        UsageError: The configuration, or fewer than two steps.
        DataError: An input.
        KeyboardInterrupt: The user's.
    """
    if steps < 2:
        raise UsageError(f"a probe takes at least 2 steps, not {steps}: the first one is always slower")
    clock = _StepClock()
    with tempfile.TemporaryDirectory() as scratch:
        here = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
        built = _train_briefly(arguments, Path(scratch), clock, steps, here)
    device = built.model.device
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else "CPU", "steps": len(clock.steps),
        "start_seconds": clock.began - clock.made, "first_step_seconds": clock.steps[0],
        "step_seconds": statistics.median(clock.steps[1:]),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if gpu else None,
    }  # fmt: skip


class _StepClock(pl.Callback):
    """Notes how long each optimizer step takes, with its data."""

    def __init__(self) -> None:
        self.made = time.perf_counter()
        self.began = 0.0
        self.steps: list[float] = []
        self._last = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.began = self._last = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > len(self.steps):
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            now = time.perf_counter()
            self.steps.append(now - self._last)
            self._last = now


def _train_briefly(
    arguments: Sequence[str], scratch: Path, watcher: pl.Callback, steps: int, more: Mapping[str, Any] | None = None
) -> Namespace:
    """Train `steps` optimizer steps with no callback but `watcher`; `more` are options of the trainer."""
    parser, config = parse(arguments)
    built = instantiate(parser, config)
    run = RunDirectory(scratch, config.name).create()
    name_initial_words(built)
    prepare_data(built, run)
    quiet_lightning()
    options = dict(vars(built.trainer)) | {
        "callbacks": [watcher], "logger": False, "max_steps": steps,
        "max_epochs": -1, "max_time": None, "limit_val_batches": 0, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": scratch, **(more or {}),
    }  # fmt: skip
    trainer = pl.Trainer(**options)
    try:
        trainer.fit(built.model, datamodule=built.data)
    except SystemExit as exit_:  # Lightning turns Ctrl-C into an exit of its own
        if trainer.interrupted:
            raise KeyboardInterrupt("nothing was written") from exit_
        raise
    return built


def table(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    step = report["step_ms"]
    lines = [f"{report['device']}: {step['median']:.1f} ms a step ({step['p10']:.1f} to {step['p90']:.1f})"]
    if report["launch_bound"] is not None:
        busy = report["gpu_busy_ms"] / step["median"]
        verdict = "launches are what limits it" if report["launch_bound"] else "the GPU is what limits it"
        lines[0] += f"; the GPU works {busy:.0%} of it: {verdict}"
    lines += ["", f"{'phase':34} {'ms':>9}  share"]
    whole = sum(report["phases_ms"].values())
    lines += [f"{name:34} {ms:9.2f} {ms / whole:6.1%}" for name, ms in report["phases_ms"].items()]
    for title in ("kinds", "parts"):
        lines += ["", f"{title + ' of the UNet':34} {'forward':>9} {'backward':>9}"]
        lines += [f"{row['name']:34} {row['forward_ms']:9.2f} {row['backward_ms']:9.2f}" for row in report[title]]
    lines += ["", f"{'operator':34} {'own ms':>9}  share  calls"]
    lines += [
        f"{_short(row['name']):34} {row['own_ms']:9.2f} {row['share']:6.1%} {row['calls']:6.0f}"
        for row in report["operators"][:ROWS]
    ]
    return "\n".join(lines)


def _short(operator: str) -> str:
    name = operator.removeprefix("aten::")
    return name if len(name) <= 34 else f"{name[:33]}…"


def draw(report: dict[str, Any], path: Path) -> None:
    """Phases, parts, kinds and operators as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9), layout="constrained")
    phases, kinds, parts, operators = figure.subplots(4, 1, height_ratios=[1, 3, 5, 5])
    left = 0.0
    for name, ms in report["phases_ms"].items():
        phases.barh(0, ms, left=left, label=f"{name} {ms:.1f} ms")
        left += ms
    phases.set_yticks([])
    phases.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.35), ncols=4, frameon=False)
    phases.set_title(f"{report['device']}: {report['step_ms']['median']:.1f} ms a step", loc="left")
    for axes, title in ((kinds, "kinds"), (parts, "parts")):
        rows = report[title][::-1]
        names = [row["name"] for row in rows]
        axes.barh(names, [row["forward_ms"] for row in rows], label="forward")
        axes.barh(
            names, [row["backward_ms"] for row in rows], left=[row["forward_ms"] for row in rows], label="backward"
        )
        axes.set_title(f"{title} of the UNet, ms a step", loc="left")
        axes.legend(frameon=False, loc="lower right")
    rows = report["operators"][:ROWS][::-1]
    operators.barh([_short(row["name"]) for row in rows], [row["own_ms"] for row in rows], color="tab:gray")
    operators.set_title("operators, own ms a traced step (tracing slows them)", loc="left")
    for axes in (kinds, parts, operators):
        axes.spines[["top", "right"]].set_visible(False)
    phases.spines[:].set_visible(False)
    figure.savefig(path, format="png", dpi=100)
