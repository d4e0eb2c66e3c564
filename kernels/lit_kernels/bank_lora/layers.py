"""PEFT's LoRA layers through `bank_lora`: no cast of activations, no launch for scale and sum.

A layer's factors are those of one adapter, `[R, in]` and `[out, R]`, or of a bank's G, `[G, R, in]` and `[G, out, R]`.
A layer keeps its class, parameters and names; only its `forward` is another one, which reads what the layer carries in
every call and gives back to PEFT's own whatever `bank_lora` cannot express. `project` takes layers of one input, such
as q, k and v of self-attention, together.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_kernels import backend as backends
from lit_kernels.bank_lora.function import NAME, bank_lora, key_of, launched, unsupported
from lit_kernels.packing import lay_side_by_side
from lit_kernels.slices import projection_of

Scales = dict[tuple[tuple[float, ...], int, torch.device], Tensor]


def fuse(layer: nn.Module, backend: backends.Backend = "auto") -> None:
    """Give a PEFT layer around a linear one the fused forward; `unfuse` takes it away."""
    layer.__dict__["_lit_backend"] = backend
    layer.__dict__["_lit_scales"] = {}
    layer.__dict__["forward"] = types.MethodType(_forward, layer)  # a copy of the layer binds it anew


def unfuse(layer: nn.Module) -> None:
    """Undo `fuse`."""
    for name in ("forward", "_lit_backend", "_lit_scales"):
        layer.__dict__.pop(name, None)


def project(layers: Sequence[Any], x: Tensor) -> list[Tensor]:
    """What up to three layers make of x `[..., K]`.

    Fused layers of one rank, width and dtype, without a bias, are one launch where the kernels run. Frozen layers
    without factors are one product, of weights that are laid side by side for it. Others go alone.
    """
    if (frozen := _frozen(layers, x)) is not None:
        return list(F.linear(x, lay_side_by_side(frozen)).split([len(weight) for weight in frozen], dim=-1))
    joint: dict[int, _Read] = {}
    for number, layer in enumerate(layers):
        read = _read(layer, x) if "_lit_backend" in layer.__dict__ else None
        if read is not None and read.bias is None and _takes_kernels(layer, read, x):
            joint[number] = read
    if len(joint) < 2 or len({(r.up.shape, r.up.dtype, r.down.dtype) for r in joint.values()}) > 1:
        return [layer(x) for layer in layers]
    ys = dict(zip(joint, _launched(layers[next(iter(joint))], list(joint.values()), x), strict=True))
    return [ys[number] if number in ys else layer(x) for number, layer in enumerate(layers)]


def _frozen(layers: Sequence[Any], x: Tensor) -> list[Tensor] | None:
    """The weights, if all layers are nothing else. Compiled code cannot see how they lie, and would copy them."""
    if torch.compiler.is_compiling():
        return None
    weights = []
    for layer in layers:
        found = projection_of(layer)
        if isinstance(found, str) or found.rank or found.bias is not None or found.weight.requires_grad:
            return None
        weight = found.weight
        moves = isinstance(weight, nn.Parameter) and not hasattr(weight, "device_mesh")  # a shard stays where it is
        if not moves or weight.dtype != x.dtype or layer._forward_hooks:
            return None
        weights.append(weight)
    return weights if len({(weight.device, weight.shape[1]) for weight in weights}) == 1 else None


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    read = None if args or kwargs else _read(layer, x)
    if read is None:
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    if _takes_kernels(layer, read, x):
        return _launched(layer, [read], x)[0]
    scales = _scales_of(layer, [read], x.device)[0]
    downs, ups = (factor if factor.ndim == 3 else factor[None] for factor in (read.down, read.up))
    return bank_lora(x, read.weight, downs, ups, scales, read.bias, layer._lit_backend)


class _Read(NamedTuple):
    weight: Tensor
    down: Tensor
    up: Tensor
    scale: float
    bias: Tensor | None

    @property
    def adapters(self) -> int:
        """G."""
        return len(self.down) if self.down.ndim == 3 else 1


def _read(layer: Any, x: Tensor) -> _Read | None:
    """The layer with its factors, if it is one that `bank_lora` can compute."""
    found = projection_of(layer)
    if isinstance(found, str) or found.down is None or found.up is None or found.weight.dtype != x.dtype:
        return None
    return _Read(found.weight, found.down, found.up, found.scale, found.bias)


def _takes_kernels(layer: Any, read: _Read, x: Tensor) -> bool:
    rank, adapters = read.down.shape[-2], read.adapters
    reason = unsupported(x, read.weight, rank, read.bias)
    if layer._lit_backend == "auto" and x.dtype not in (torch.float16, torch.bfloat16):
        reason = reason or f"torch multiplies {x.dtype} as fast"
    key = None if reason else key_of(x.dtype, x.shape[:-1].numel() // adapters, read.weight, adapters, rank)
    return backends.choose(NAME, layer._lit_backend, x.device, reason, key) == "triton"


def _launched(layer: Any, parts: Sequence[_Read], x: Tensor) -> list[Tensor]:
    weights, downs, ups = ([part[at] for part in parts] for at in (0, 1, 2))
    return launched(x, weights, downs, ups, _scales_of(layer, parts, x.device), parts[0].bias)  # type: ignore[arg-type]


def _scales_of(layer: Any, parts: Sequence[_Read], device: torch.device) -> Tensor:
    """`[P, G]`; kept, so that a step copies nothing to the GPU."""
    scales: Scales = layer._lit_scales
    key = (tuple(p.scale for p in parts), parts[0].adapters, device)
    if key not in scales:
        column = torch.tensor(key[0], dtype=torch.float32, device=device)[:, None]
        scales[key] = column.expand(-1, key[1]).contiguous()
    return scales[key]
