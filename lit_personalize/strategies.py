"""Which of Lightning's strategies a training may use, what each needs, and what goes with none of them but DDP.

Adapters are small, so their strategy is DDP. Whole weights are another matter: FSDP2 (`ModelParallelStrategy`) shares
out the base, what trains in it and the optimizer; FSDP and DeepSpeed's ZeRO share out what trains and the optimizer
(ZeRO-3 the base, too).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)

from lit_personalize import whole_states
from lit_personalize.errors import UsageError
from lit_personalize.objectives.denoising import Denoising

SHARDING = (ModelParallelStrategy, FSDPStrategy, DeepSpeedStrategy)


def is_sharding(strategy: Strategy) -> bool:
    """Whether ranks hold shares of what trains, so that no process has it whole after the training."""
    return isinstance(strategy, SHARDING)


def state_kind(strategy: Strategy) -> str:
    """Which states the strategy writes and reads: see `sharded_state.kind`."""
    if isinstance(strategy, DeepSpeedStrategy):
        return "deepspeed"
    return "distributed" if is_sharding(strategy) else "whole"


def refusals(
    strategy: Strategy, objective: Denoising, ema: bool = False, best: bool = False, ranks: int | None = None
) -> Iterator[str]:
    """Why a strategy cannot train this objective, whose base is loaded; every reason there is.

    Args:
        ranks: Devices of all nodes; None where they are not known.
    """
    if not is_sharding(strategy):
        return
    name = type(strategy).__name__
    if ema:
        yield f"ema: {name} keeps shares of what trains, and averages are of the whole; use ddp, or no ema"
    if best:
        yield f"checkpoint.best draws on one rank, and under {name} no rank has all weights; use ddp"
    for adapter in objective.trained:
        if adapter.span != (0, 1):
            yield f"{adapter.name} has a span: under {name} everything trains all the time; use ddp"
    if isinstance(strategy, ModelParallelStrategy):
        yield from _refused_by_model_parallel(strategy, ranks)
    elif isinstance(strategy, FSDPStrategy):
        yield from _refused_by_fsdp(strategy, objective)
    else:
        yield from _refused_by_deepspeed(strategy, objective)


def prepare(
    strategy: Strategy, objective: Denoising, ema: bool = False, best: bool = False, ranks: int | None = None
) -> None:
    """Give a strategy what it needs to train this objective, whose base is loaded.

    Raises:
        UsageError: It cannot.
    """
    for reason in refusals(strategy, objective, ema, best, ranks):
        raise UsageError(reason)
    suit(strategy, objective)


def suit(strategy: Strategy, objective: Denoising) -> None:
    """Set both up for each other, whatever `refusals` says.

    Raises:
        UsageError: An adapter reads weights of the base that ZeRO-3 shares out.
    """
    if isinstance(strategy, DDPStrategy) and objective.trains_text:
        # SDXL leaves out the last layer of an encoder, and a batch may name no trained token.
        strategy._ddp_kwargs.setdefault("find_unused_parameters", True)
    if not is_sharding(strategy):
        return
    objective.spread = True
    for adapter in objective.trained:
        adapter.steady = False
    if isinstance(strategy, DeepSpeedStrategy):
        _prepare_deepspeed(strategy, objective)
        return
    whole_states.keep_in_header(cast(Any, strategy))
    objective.replicated = [adapter for adapter in objective.trained if not adapter.elementwise]
    if isinstance(strategy, FSDPStrategy):
        # One unit of all changes of whole weights; the base is frozen, of another type, and whole on every rank.
        whole = [*objective.built.parameters(), *(p for a in objective.replicated for p in a.factors.values())]
        strategy.kwargs |= {"ignored_states": whole, "use_orig_params": True}


def draws_together(strategy: Strategy) -> bool:
    """Whether a rank alone cannot use what it trains, so that pictures are drawn by all of them."""
    return isinstance(strategy, ModelParallelStrategy | FSDPStrategy) or _is_stage_3(strategy)


def gathers_base(strategy: Strategy) -> bool:
    """Whether weights of the base are whole only while they are used."""
    return isinstance(strategy, ModelParallelStrategy) or _is_stage_3(strategy)


@contextmanager
def whole(trainer: pl.Trainer) -> Iterator[None]:
    """Within, what trains can be used outside of a training step; all ranks enter where `draws_together`."""
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(cast(Any, strategy.model), writeback=False):
            yield
    else:
        yield


def _refused_by_model_parallel(strategy: Any, ranks: int | None) -> Iterator[str]:
    if strategy._tensor_parallel_size != 1 or strategy._data_parallel_size == "auto":
        yield (
            "ModelParallelStrategy: set tensor_parallel_size: 1, and data_parallel_size to the number of all devices; "
            "each rank reads pictures of its own"
        )
    elif ranks is not None and strategy._data_parallel_size != ranks:
        yield (
            f"ModelParallelStrategy: data_parallel_size is {strategy._data_parallel_size}, and trainer.devices times "
            f"trainer.num_nodes is {ranks}; make them the same"
        )
    if not strategy._save_distributed_checkpoint:
        yield "ModelParallelStrategy: save_distributed_checkpoint must stay true"


def _refused_by_fsdp(strategy: Any, objective: Denoising) -> Iterator[str]:
    if strategy._state_dict_type != "sharded":
        yield "FSDPStrategy: set state_dict_type: sharded, which any number of ranks can go on from"
    if not any(adapter.elementwise for adapter in objective.trained):
        yield f"FSDPStrategy: {objective.trained[0].name} is too small to be shared out; use ddp"


def _refused_by_deepspeed(strategy: Any, objective: Denoising) -> Iterator[str]:
    for adapter in objective.trained:
        if adapter.corrects:
            yield f"{adapter.name} puts itself right after each step, which DeepSpeed would undo; use ddp"
    if not strategy.exclude_frozen_parameters:
        yield "DeepSpeedStrategy: set exclude_frozen_parameters: true; the base is not part of a checkpoint"


def _prepare_deepspeed(strategy: Any, objective: Denoising) -> None:
    if _is_stage_3(strategy):
        objective.place_factors()
    # An offloaded optimizer may be torch's own, which DeepSpeed would refuse as slower than its DeepSpeedCPUAdam.
    strategy.config.setdefault("zero_force_ds_cpu_optimizer", False)


def _is_stage_3(strategy: Strategy) -> bool:
    if not isinstance(strategy, DeepSpeedStrategy):
        return False
    config: Any = strategy.config or {}
    return bool(config.get("zero_optimization", {}).get("stage") == 3)
