"""PEFT's LoRA layers through `bank_lora` with one adapter: no cast of activations, no launch for scale and sum.

A layer keeps its class, parameters and names; only its `forward` is another one, which reads what the layer carries in
every call and gives back to PEFT's own whatever `bank_lora` cannot express.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from lit_kernels.backend import Backend
from lit_kernels.bank_lora.function import bank_lora
from lit_kernels.slices import Projection, projection_of


def fuse(layer: nn.Module, backend: Backend = "auto") -> None:
    """Give a PEFT layer around a linear one the fused forward; `unfuse` takes it away."""
    layer.__dict__["_lit_backend"] = backend
    layer.__dict__["_lit_scales"] = {}
    layer.__dict__["forward"] = types.MethodType(_forward, layer)  # a copy of the layer binds it anew


def unfuse(layer: nn.Module) -> None:
    """Undo `fuse`."""
    for name in ("forward", "_lit_backend", "_lit_scales"):
        layer.__dict__.pop(name, None)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    found = None if args or kwargs else projection_of(layer)
    if not isinstance(found, Projection) or found.down is None or found.up is None or found.weight.dtype != x.dtype:
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    scales: dict[tuple[float, torch.device], Tensor] = layer._lit_scales
    key = (found.scale, x.device)
    if key not in scales:
        scales[key] = torch.tensor([found.scale], dtype=torch.float32, device=x.device)
    return bank_lora(x, found.weight, found.down[None], found.up[None], scales[key], found.bias, layer._lit_backend)
