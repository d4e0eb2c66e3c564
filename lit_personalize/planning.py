"""`litp plan`: what a configuration will take, before anything is trained, and why it could not be.

The base is built from its configs alone, and one training step runs on tensors without values; so neither weights nor
a GPU are needed. Whatever `fit` would refuse before its first step is refused here by the same functions, all of it at
once.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_kernels.backend import without_values
from lit_personalize import checkpoints, fitting, preflight, strategies
from lit_personalize.adapters.token_embedding import RANDOM, TokenEmbedding
from lit_personalize.batch import Role
from lit_personalize.configuration import instantiate, parse
from lit_personalize.errors import UsageError
from lit_personalize.objectives.denoising import Denoising
from lit_personalize.planning_data import Pictures, count_pictures, without_data
from lit_personalize.planning_disk import disk_of
from lit_personalize.planning_memory import StepMemory, View, count_step, fake_objective
from lit_personalize.planning_shares import DeviceMemory, per_device
from lit_personalize.run_directory import RunDirectory

LESS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("bfloat16", {"model.init_args.dtype": "bfloat16"}),
    ("gradient checkpointing", {"model.init_args.gradient_checkpointing": True}),
    ("one picture a batch", {"data.init_args.batch_size": 1}),
)
"""What is tried, one on top of the other, until a training fits a card."""
MORE = (2, 4, 8, 16)
"""GPUs of FSDP2 that are tried after that."""


@dataclass
class Plan:
    """What a run will take; bytes, steps and reasons."""

    run: str
    strategy: str
    devices: int
    accelerator: str
    parameters: dict[str, int]
    """Frozen ones by component, trained ones by adapter."""
    types: dict[str, str]
    step: StepMemory
    device: DeviceMemory
    pictures: Pictures
    schedule: dict[str, Any]
    disk: dict[str, int]
    notes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    probe: dict[str, Any] | None = None
    memory: int | None = None
    """Bytes of the card that was asked about."""
    instead: list[dict[str, Any]] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """For JSON."""
        told = asdict(self)
        told["device"]["peak"] = self.device.peak
        told["fits"] = None if self.memory is None else self.device.peak <= self.memory
        return told


def plan(arguments: Sequence[str], memory: float | None = None, probe: int = 0) -> Plan:
    """Plan a training; `arguments` are those of `litp fit`.

    Args:
        memory: GB of a card (10⁹ bytes) that it shall fit.
        probe: Steps to train here, in a place that is removed, to see how long they take; 0 trains none.

    Raises:
        UsageError: The configuration cannot be read; what it asks for together and cannot have is in `refused`.
        DataError: The base's configs are missing or damaged.
    """
    measured = None
    if probe:
        from lit_personalize.profiling import time_steps

        measured = time_steps(arguments, probe)
    found, _ = _counted(arguments, {}, memory is not None)
    found.probe = measured
    if memory is not None:
        found.memory = round(memory * 1e9)
        if found.device.peak > found.memory:
            found.instead = list(_smaller(arguments, found.memory))
    return found


def _smaller(arguments: Sequence[str], memory: int) -> Iterator[dict[str, Any]]:
    """What would make it fit, cumulatively; then the fewest GPUs of FSDP2."""
    changes: dict[str, Any] = {}
    given = parse(arguments)[1]
    for name, change in LESS:
        [(key, value)] = change.items()
        with contextlib.suppress(KeyError, AttributeError, TypeError):
            if given[key] == value:
                continue
        changes |= change
        peak = _counted(arguments, changes, True)[0].device.peak
        yield {"change": name, "set": {key: value}, "peak": peak, "fits": peak <= memory}
        if peak <= memory:
            return
    init = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    sharded = {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy", "init_args": init}
    tried, on = _counted(arguments, changes | {"trainer.strategy": sharded, "trainer.devices": 2}, True)
    if tried.refused:
        return
    for ranks in MORE:
        peak = on(ranks).peak
        if peak <= memory or ranks == MORE[-1]:
            named = {"trainer.strategy": "ModelParallelStrategy", "trainer.devices": ranks}
            yield {"change": f"FSDP2 on {ranks} GPUs", "set": named, "peak": peak, "fits": peak <= memory}
            return


def _counted(
    arguments: Sequence[str], changes: dict[str, Any], for_card: bool
) -> tuple[Plan, Callable[[int], DeviceMemory]]:
    """The plan with changed keys, and what each of another number of devices would hold."""
    refused: list[str] = []
    parser, config = parse(arguments)
    for key, value in changes.items():
        config[key] = Namespace(**value) if isinstance(value, dict) else value
        if isinstance(value, dict):
            config[key].init_args = Namespace(**value["init_args"])
    of_data, of_model = config.clone(), config.clone()
    del of_data["model"], of_model["data"]  # each by itself, so that one that refuses does not hide the other
    built = instantiate(parser, of_model)
    data: Any = None
    with _collecting(refused):
        data = instantiate(parser, of_data).data
    objective: Denoising = built.model
    gpu, ranks = _places(built.trainer, for_card)
    strategy: Strategy = SingleDeviceStrategy("cpu")
    with _collecting(refused):
        strategy = _strategy_of(built.trainer, ranks)
    built.data = data
    with _collecting(refused):
        fitting.name_initial_words(built)
    for adapter in objective.trained:  # a word to count with, where none could be found
        if isinstance(adapter, TokenEmbedding) and fitting.CLASS in (adapter.init, *adapter.init):
            adapter.init = RANDOM
    mode = fake_objective(objective)
    components = {name: list(m.parameters()) for name, m in objective.built.components().items()}
    parameters = {name: sum(p.numel() for p in own) for name, own in components.items()}
    types = {name: str(own[0].dtype).removeprefix("torch.") for name, own in components.items() if own}
    for adapter in objective.trained:
        parameters[adapter.name] = sum(p.numel() for p in adapter.factors.values())
        types[adapter.name] = "float32"
    pictures: Pictures | None = None
    if data is not None:
        with _collecting(refused):
            pictures = count_pictures(data, objective)
    pictures = pictures or without_data(objective, config.data.init_args)
    notes = [f"pictures are not counted: {pictures.missing}"] if pictures.missing and not pictures.damaged else []
    schedule = _schedule(built.trainer, pictures, ranks)
    if pictures.damaged:
        refused.append(pictures.missing)
    refused += _refusals(built, strategy, pictures, ranks, schedule["optimizer_steps"])
    averaged = built.ema is not None
    with mode, contextlib.suppress(UsageError):  # which is among the reasons
        strategies.suit(strategy, objective)
        if isinstance(strategy, ModelParallelStrategy):
            objective.place_factors()
    with _collecting(refused):
        if objective.sharded or objective.kernels not in ("auto", "triton"):
            objective.fuse_kernels(device="cuda" if gpu else "cpu")
    step = _step(objective, mode, pictures.view, strategy, gpu, built.trainer, notes)
    if step.note:
        notes.append(f"optimizer state is not counted: {step.note}")
    on = functools.partial(per_device, step, objective, strategy, averaged=averaged)
    device = on(ranks)
    found = Plan(
        run=config.name, strategy=_name_of(strategy), devices=ranks, accelerator="gpu" if gpu else "cpu",
        parameters=parameters, types=types, step=step, device=device, pictures=pictures, schedule=schedule,
        disk=disk_of(built, step, pictures, schedule["optimizer_steps"]), notes=notes,
        refused=list(dict.fromkeys(refused)),
    )  # fmt: skip
    return found, on


def _step(
    objective: Denoising, mode: Any, view: View, strategy: Strategy, gpu: bool, trainer: Any, notes: list[str]
) -> StepMemory:
    """Count a step, with fused kernels where a GPU would run them."""
    how = {
        "accumulates": trainer.accumulate_grad_batches > 1, "shared": strategies.is_sharding(strategy), "foreach": gpu,
    }  # fmt: skip
    if gpu and not objective.sharded and objective.kernels in ("auto", "triton"):
        asked = objective.kernels
        try:
            with without_values():
                objective.kernels = "triton"
                objective.fuse_kernels(device="cuda")
                return count_step(objective, mode, view, **how)
        except (UsageError, ValueError) as error:
            notes.append(f"memory is counted without fused kernels: {error}")
            objective.kernels = "off"
            objective.fuse_kernels(device="cuda")
        finally:
            objective.kernels = asked
    return count_step(objective, mode, view, **how)


@contextlib.contextmanager
def _collecting(refused: list[str]) -> Iterator[None]:
    """Note why something is refused, and go on."""
    try:
        yield
    except Exception as error:
        if getattr(error, "exit_code", None) is None and not isinstance(error, MisconfigurationException):
            raise
        refused.append(str(error))


def _refusals(built: Namespace, strategy: Strategy, pictures: Pictures, ranks: int, steps: int | None) -> list[str]:
    """Every reason for which `fit` would not begin, of those that need a base and data."""
    objective: Denoising = built.model
    averaged, best = built.ema is not None, built.checkpoint.best
    refused = list(strategies.refusals(strategy, objective, averaged, best, ranks))
    checks: list[Callable[[], object]] = [
        lambda a=adapter, f=name: preflight.refuse_formats([a], [f])  # type: ignore[misc]
        for adapter in objective.trained
        for name in built.export.formats
    ]
    if pictures.concepts:
        later = {int(Role.PRIOR)} if pictures.view.priors else set()
        checks.append(lambda: preflight.check(objective, built.data, later))
        run = RunDirectory(built.root, built.name)
        checks.append(lambda: fitting.callbacks_of(built, run))
    for adapter in objective.trained:
        checks.append(lambda a=adapter: a.at_step(0, steps or 2**31))  # type: ignore[misc]
        if strategies.gathers_base(strategy) and not adapter.elementwise:  # others are placed later, once
            checks.append(adapter.place)
    checks.append(lambda: _refuse_other_run(built, strategy))
    for check in checks:
        with _collecting(refused):
            check()
    return refused


def _refuse_other_run(built: Namespace, strategy: Strategy) -> None:
    folder = RunDirectory(built.root, built.name)
    found = checkpoints.find_complete(folder.checkpoints) if folder.checkpoints.is_dir() else None
    fitting.refuse_resume(found, built, folder)
    if found:
        fitting.refuse_other_strategy(found, strategy)


def _places(trainer: Any, for_card: bool) -> tuple[bool, int]:
    """Whether it trains on GPUs, and on how many devices of all nodes together."""
    gpu = trainer.accelerator in ("gpu", "cuda")
    gpu = gpu or (trainer.accelerator == "auto" and (for_card or torch.cuda.is_available()))
    devices = trainer.devices
    if devices in ("auto", -1, "-1"):
        here = (torch.cuda.device_count() or 1) if gpu else 1
    elif isinstance(devices, list):
        here = len(devices)
    else:
        here = len(devices.strip(",").split(",")) if isinstance(devices, str) and "," in devices else int(devices)
    return gpu, here * int(trainer.num_nodes)


def _strategy_of(trainer: Any, ranks: int) -> Strategy:
    """The strategy that Lightning takes for the trainer's options.

    Raises:
        UsageError: There is none of that name, or it lacks a package.
    """
    chosen = trainer.strategy
    if isinstance(chosen, Strategy):
        return chosen
    if chosen == "auto":
        return DDPStrategy() if ranks > 1 else SingleDeviceStrategy("cpu")
    if chosen not in StrategyRegistry:
        raise UsageError(f"trainer.strategy: there is no strategy {chosen!r}")
    made: Strategy = StrategyRegistry.get(chosen)
    return made


def _name_of(strategy: Strategy) -> str:
    name = type(strategy).__name__
    config: Any = getattr(strategy, "config", None)
    stage = config.get("zero_optimization", {}).get("stage") if isinstance(config, dict) else None
    return name if stage is None else f"{name}, stage {stage}"


def _schedule(trainer: Any, pictures: Pictures, ranks: int) -> dict[str, Any]:
    """Optimizer steps, pictures in each, and how often each picture is shown; None where it is not known."""
    accumulated, instances = trainer.accumulate_grad_batches, pictures.view.instances
    per_step = instances * ranks * accumulated
    epoch = None if not pictures.places else math.ceil(pictures.places / (instances * ranks))
    steps: int | None = trainer.max_steps if trainer.max_steps and trainer.max_steps > 0 else None
    if trainer.max_epochs and trainer.max_epochs > 0 and epoch:
        of_epochs = trainer.max_epochs * math.ceil(epoch / accumulated)
        steps = min(steps, of_epochs) if steps else of_epochs
    return {
        "optimizer_steps": steps, "instances_per_step": per_step,
        "regularization_per_step": pictures.view.priors * ranks * accumulated,
        "batch_per_device": instances, "accumulated": accumulated, "batches_per_epoch": epoch,
        "shown_per_picture": steps * per_step / pictures.places if steps and pictures.places else None,
    }  # fmt: skip
