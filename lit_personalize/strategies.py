"""Which of Lightning's strategies a training may use, what each needs, and what goes with none of them but DDP.

Adapters are small, so their strategy is DDP. Whole weights are another matter: FSDP2 (`ModelParallelStrategy`) shares
out the base, what trains in it and the optimizer; FSDP and DeepSpeed's ZeRO share out what trains and the optimizer
(ZeRO-3 the base, too).
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from lit_personalize.errors import UsageError
from lit_personalize.objectives.objective import Objective

SHARDING = (ModelParallelStrategy, FSDPStrategy, DeepSpeedStrategy)


def is_sharding(strategy: Strategy) -> bool:
    """Whether ranks hold shares of what trains, so that no process has it whole after the training."""
    return isinstance(strategy, SHARDING)


def state_kind(strategy: Strategy) -> str:
    """Which states the strategy writes and reads: see `sharded_state.kind`."""
    if isinstance(strategy, DeepSpeedStrategy):
        return "deepspeed"
    return "distributed" if is_sharding(strategy) else "whole"


def prepare(strategy: Strategy, objective: Objective, ema: bool = False) -> None:
    """Give a strategy what it needs to train this objective, whose base is loaded.

    Raises:
        UsageError: It cannot.
    """
    if not is_sharding(strategy):
        return
    name = type(strategy).__name__
    if ema:
        raise UsageError(f"ema: {name} keeps shares of what trains, and averages are of the whole; use ddp, or no ema")
    if spans := [adapter.name for adapter in objective.trained if adapter.span != (0, 1)]:
        raise UsageError(f"{spans[0]} has a span: under {name} everything trains all the time; use ddp")
    if isinstance(strategy, ModelParallelStrategy):
        _prepare_model_parallel(strategy)


def _prepare_model_parallel(strategy: Any) -> None:
    if strategy._tensor_parallel_size != 1 or strategy._data_parallel_size == "auto":
        raise UsageError(
            "ModelParallelStrategy: set tensor_parallel_size: 1, and data_parallel_size: to the number of all devices; "
            "each rank reads pictures of its own"
        )
    if not strategy._save_distributed_checkpoint:
        raise UsageError("ModelParallelStrategy: save_distributed_checkpoint must stay true")


