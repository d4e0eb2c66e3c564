"""Lightning's FSDP and DeepSpeed on a CPU, for functional tests of sharding and of checkpoints alone.

The public strategies refuse a CPU, and shall: nothing here says anything about speed, memory or NCCL.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy


class CpuFSDP(FSDPStrategy):
    """`FSDPStrategy` with the device that a CPU has."""

    def _setup_model(self, model: Any) -> Any:
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(
            module=model, cpu_offload=self.cpu_offload, mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy, device_id=self.root_device, **self.kwargs,
        )  # fmt: skip


class CpuDeepSpeed(DeepSpeedStrategy):
    """`DeepSpeedStrategy` without its checks for a GPU."""

    def setup_environment(self) -> None:
        import deepspeed

        # Else a shared-memory operator is compiled, for two minutes; gloo does as well here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)


class _WritesAsBefore:
    """What a release before `whole_states` wrote: Lightning's own checkpoint, whatever the strategy is told."""

    @property
    def save_checkpoint(self) -> Any:
        return super().save_checkpoint  # type: ignore[misc]

    @save_checkpoint.setter
    def save_checkpoint(self, other: Any) -> None:
        pass


class EarlierFSDP2(_WritesAsBefore, ModelParallelStrategy):
    """`ModelParallelStrategy`."""


class EarlierFSDP(_WritesAsBefore, CpuFSDP):
    """`FSDPStrategy`."""
