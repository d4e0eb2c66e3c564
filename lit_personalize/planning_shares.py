"""What each of several GPUs holds under a strategy, from the bytes of a step on one device that holds everything.

Shares of parameters, gradients and moments are counted; what a strategy gathers or copies for a moment is modelled.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn

from lit_personalize.objectives.denoising import Denoising
from lit_personalize.planning_memory import StepMemory
from lit_personalize.sharding import UNITS

LIVE_PARAMETERS = 1_000_000_000
"""Parameters that DeepSpeed's ZeRO-3 leaves gathered, by its default."""


@dataclass
class DeviceMemory:
    """Bytes on each device."""

    resident: dict[str, int]
    """What lives between steps, by kind."""
    gradients: int
    saved: int
    phases: dict[str, int]
    """Most bytes alive in each phase of a step, modelled."""

    @property
    def peak(self) -> int:
        """Of all phases."""
        return max(self.phases.values())


def rows_of(parameter: nn.Parameter, ranks: int) -> int:
    """Bytes of the first, and largest, of the shares along a parameter's first dimension, as FSDP2 cuts it."""
    if not parameter.ndim or not parameter.numel():
        return parameter.nbytes
    return -(-parameter.shape[0] // ranks) * parameter[:1].numel() * parameter.element_size()


def per_device(
    step: StepMemory, objective: Denoising, strategy: Strategy, ranks: int, averaged: bool = False
) -> DeviceMemory:
    """What a device holds.

    Args:
        step: Counted with `shared` where `strategies.is_sharding`.
        objective: The one that was counted, prepared for the strategy, and placed where its base is shared out.
        averaged: Whether an average of what trains is kept.
    """
    if isinstance(strategy, ModelParallelStrategy):
        return _model_parallel(step, objective, ranks)
    if isinstance(strategy, FSDPStrategy):
        return _fsdp(step, objective, ranks)
    if isinstance(strategy, DeepSpeedStrategy):
        return _deepspeed(step, strategy, ranks)
    resident = {
        "base": sum(step.base.values()), "trained": step.trained, "formed": step.formed,
        "optimizer": step.optimizer or 0, "average": step.trained if averaged else 0,
        "copies of gradients": step.trained if ranks > 1 else 0,  # DDP's buckets
    }  # fmt: skip
    return _with_phases(step, resident, step.trained, 0, step.trained, 1.0)


def _with_phases(
    step: StepMemory, resident: dict[str, int], gradients: int, gathered: int, before: int, share: float
) -> DeviceMemory:
    """Add up.

    Args:
        gathered: What is whole for a moment, with the gradients of it.
        before: Gradients that the count of the forward and backward pass has already.
        share: Of the optimizer's step.
    """
    always, more = sum(resident.values()), gradients - before
    phases = {
        "forward": always + step.forward + gathered + more,
        "backward": always + step.backward + gathered + more,
        "optimizer": always + gradients + round(step.update * share),
    }
    if step.encoding:
        phases["encoding pictures"] = always + gradients + step.encoding
    return DeviceMemory({k: v for k, v in resident.items() if v}, gradients, step.saved, phases)


def _share_of_state(step: StepMemory, own: int) -> int:
    return round((step.optimizer or 0) * own / step.trained)


def _model_parallel(step: StepMemory, objective: Denoising, ranks: int) -> DeviceMemory:
    base = objective.built
    frozen, own, root, units = 0, 0, 0, [0]
    for name, component in base.components().items():
        if name != "unet" and not any(p.requires_grad for p in component.parameters()):
            frozen += step.base[name]
            continue
        frozen += sum(b.nbytes for b in component.buffers())
        frozen += sum(rows_of(p, ranks) for p in component.parameters() if not p.requires_grad)
        own += sum(rows_of(p, ranks) for p in component.parameters() if p.requires_grad)
        members = [list(m.parameters()) for m in component.modules() if type(m).__name__ in UNITS]
        units += [sum(p.nbytes for p in unit) + _trained(unit) for unit in members]  # with gradients
        inside = {id(p) for unit in members for p in unit}
        outer = [p for p in component.parameters() if id(p) not in inside]
        root += sum(p.nbytes for p in outer) + _trained(outer)
    own += _trained(p for adapter in objective.replicated for p in adapter.factors.values())
    resident = {"base": frozen, "trained": own, "formed": step.formed, "optimizer": _share_of_state(step, own)}
    return _with_phases(step, resident, own, root + 2 * max(units), 0, own / step.trained)


def _trained(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.nbytes for p in parameters if p.requires_grad)


def _fsdp(step: StepMemory, objective: Denoising, ranks: int) -> DeviceMemory:
    whole = _trained(p for adapter in objective.replicated for p in adapter.factors.values())
    shared = step.trained - whole
    own = -(-shared // ranks) + whole
    resident = {
        "base": sum(step.base.values()), "trained": own, "formed": step.formed, "optimizer": _share_of_state(step, own),
    }  # fmt: skip
    return _with_phases(step, resident, own, 2 * shared, 0, own / step.trained)  # the changes and their gradients


def _deepspeed(step: StepMemory, strategy: Any, ranks: int) -> DeviceMemory:
    zero = strategy.config["zero_optimization"]
    stage, offloads = zero["stage"], "offload_optimizer" in zero
    own = -(-step.trained // ranks)
    frozen, trained, gathered = sum(step.base.values()), step.trained, 0
    if stage == 3:
        gathered = min(frozen + trained, 2 * LIVE_PARAMETERS)
        frozen, trained = (0, 0) if "offload_param" in zero else (-(-frozen // ranks), own)
    gradients = own if stage > 1 else step.trained
    if offloads:
        gradients = 0
    bucket = min(step.trained, 4 * int(zero.get("reduce_bucket_size", 0)))
    resident = {
        "base": frozen, "trained": trained, "formed": step.formed,
        "optimizer": 0 if offloads else _share_of_state(step, own),
        "copy that steps": 0 if offloads else own,  # DeepSpeed's own of its share
    }  # fmt: skip
    return _with_phases(step, resident, gradients, gathered + bucket, 0, 0.0 if offloads else own / step.trained)
