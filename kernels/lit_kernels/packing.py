"""Many small tensors as one, without copying them where they already lie side by side in memory.

A kernel over all layers wants one tensor; a state dict wants each layer's own. `lay_side_by_side` moves tensors into
one storage and keeps them as views of it, and `packed` sees that and gives the whole storage back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.cat(tensors)`, differentiable, and a view instead of a copy where they lie side by side."""
    if len(tensors) == 1:
        return tensors[0]
    if torch.compiler.is_compiling():
        return torch.cat(list(tensors))
    return _Packed.apply(*tensors)


def lay_side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """Move tensors of one dtype, device and trailing shape into one storage: each becomes a view of what is returned.

    Only `.data` changes: parameters stay the same objects.
    """
    if (there := _whole(tensors)) is not None:
        return there
    whole = torch.cat([tensor.detach() for tensor in tensors])
    for tensor, part in zip(tensors, whole.split([len(tensor) for tensor in tensors]), strict=True):
        tensor.data = part
    if (found := _whole(tensors)) is None:
        raise ValueError("these tensors cannot share a storage: their dtypes, devices or trailing shapes differ")
    return found


def _whole(tensors: Sequence[Tensor]) -> Tensor | None:
    """The view that covers all of them, if they follow each other in one storage."""
    first = tensors[0]
    begin, rows = first.storage_offset(), 0
    storage = first.untyped_storage()._cdata  # the storage itself: meta tensors have no address
    for tensor in tensors:
        if (
            tensor.dtype != first.dtype
            or tensor.shape[1:] != first.shape[1:]
            or not tensor.is_contiguous()
            or tensor.untyped_storage()._cdata != storage
            or tensor.storage_offset() != begin + rows * first[0].numel()
        ):
            return None
        rows += len(tensor)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride(), begin)


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.lengths = [len(tensor) for tensor in tensors]
        whole = _whole(tensors)
        return torch.cat(tensors) if whole is None else whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return gradient.split(ctx.lengths)
