"""Which device a verb computes on; Lightning chooses that of a training by `trainer.accelerator`."""

from __future__ import annotations

import os

import torch

from lit_personalize.errors import UsageError


def default_device() -> torch.device:
    """This process's GPU if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    return torch.device("cuda", rank % torch.cuda.device_count())


def device_of(option: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "gpu" names.

    Raises:
        UsageError: A GPU is asked for, and there is none.
    """
    if option == "cpu":
        return torch.device("cpu")
    device = default_device()
    if option in ("cuda", "gpu") and device.type != "cuda":
        raise UsageError(f"device {option}: PyTorch sees no GPU here; see litp doctor, or leave it at auto")
    return device
