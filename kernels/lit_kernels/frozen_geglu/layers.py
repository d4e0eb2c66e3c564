"""The gates of a UNet's feed-forward layers through `frozen_geglu`; diffusers' `GEGLU` keeps projection and names."""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor, nn

from lit_kernels.backend import Backend
from lit_kernels.frozen_geglu.function import frozen_geglu


def gates_of(unet: nn.Module) -> dict[str, nn.Module]:
    """Its `GEGLU` modules by name."""
    return {name: module for name, module in unet.named_modules() if type(module).__name__ == "GEGLU"}


def fuse(gate: nn.Module, backend: Backend = "auto") -> None:
    """Give a `GEGLU` the fused forward; `unfuse` takes it away."""
    gate.__dict__["_lit_backend"] = backend
    gate.__dict__["forward"] = types.MethodType(_forward, gate)  # a copy of the gate binds it anew


def unfuse(gate: nn.Module) -> None:
    """Undo `fuse`."""
    for name in ("forward", "_lit_backend"):
        gate.__dict__.pop(name, None)


def _forward(gate: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return frozen_geglu(gate.proj(hidden_states), gate._lit_backend)
