"""The same in plain torch, without a loop over adapters; one adapter's NaN reaches no other.

Two forms. *Grouped* is three products, of which two are batched over adapters, and each reads only what is its own.
*Augmented* is one product of [x | S] with [W | B_1 | ... | B_G]: a bank of G adapters of rank R is one of rank G·R
whose S is zero outside a row's own R columns. It does not read y again, but copies x, and launches more.
Zeros do not keep NaN away, for 0 · NaN = NaN: so S is selected and never multiplied by a mask, what is not finite in a
factor leaves the joint product (and its own adapter's rows become NaN), and the sums over rows, dA and dB, are grouped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

AUGMENTED_COLUMNS = 64
"""G·R up to which the augmented product may be taken."""
AUGMENTED_BYTES = 1 << 26
"""Size of x from which it is: a step of the augmented form reads or writes x twice less, in 16 launches more, which is
what a GPU moves in that time (modelled)."""


def bank_lora(
    x_MK: Tensor,
    weight_NK: Tensor,
    downs_GRK: Tensor,
    ups_GNR: Tensor,
    scales_G: Tensor,
    bias_N: Tensor | None = None,
    augmented: bool | None = None,
) -> Tensor:
    """As `reference.bank_lora`; W and bias learn only in the grouped form. `augmented`: which form; None decides."""
    if augmented is None:
        augmented = prefers_augmented(x_MK, weight_NK, downs_GRK, bias_N)
    if augmented:
        return _Augmented.apply(x_MK, weight_NK, downs_GRK, ups_GNR, scales_G, bias_N)
    y = torch.nn.functional.linear(x_MK, weight_NK, bias_N)
    s = _each(x_MK, downs_GRK) @ downs_GRK.to(x_MK.dtype).mT * _column(scales_G, x_MK)
    return torch.baddbmm(_each(y, downs_GRK), s, ups_GNR.to(x_MK.dtype).mT).flatten(0, 1)


def prefers_augmented(x_MK: Tensor, weight_NK: Tensor, downs_GRK: Tensor, bias_N: Tensor | None) -> bool:
    """Whether the augmented form is taken: few columns beside x, and x so large that launches do not count."""
    learns = weight_NK.requires_grad or (bias_N is not None and bias_N.requires_grad)
    few = downs_GRK.shape[:2].numel() <= AUGMENTED_COLUMNS
    return few and not learns and x_MK.numel() * x_MK.element_size() >= AUGMENTED_BYTES


class _Augmented(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, downs: Tensor, ups: Tensor, scales: Tensor, bias: Any) -> Tensor:
        s = _each(x, downs) @ downs.to(x.dtype).mT * _column(scales, x)
        ctx.save_for_backward(x, weight, downs, ups, scales, s)
        apart, up = _apart(s, ups.to(x.dtype))
        joined = torch.cat([weight, up.transpose(0, 1).flatten(1)], dim=1)
        return torch.nn.functional.linear(torch.cat([x, apart], dim=1), joined, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, downs, ups, scales, s = ctx.saved_tensors
        needs_x, _, needs_down, needs_up = ctx.needs_input_grad[:4]
        ds = _each(grad, downs) @ ups.to(grad.dtype) * _column(scales, grad)
        dx = d_down = d_up = None
        if needs_x:
            apart, down = _apart(ds, downs.to(grad.dtype))
            dx = torch.cat([grad, apart], dim=1) @ torch.cat([weight, down.flatten(0, 1)])
        if needs_down:
            d_down = (ds.mT @ _each(x, downs)).to(downs.dtype)
        if needs_up:
            d_up = (_each(grad, downs).mT @ s).to(ups.dtype)
        return dx, None, d_down, d_up, None, None


def _each(rows_MC: Tensor, downs_GRK: Tensor) -> Tensor:
    """`[G, M / G, C]`"""
    return rows_MC.unflatten(0, (len(downs_GRK), -1))


def _column(scales_G: Tensor, like: Tensor) -> Tensor:
    return scales_G.to(like.dtype)[:, None, None]


def _apart(side_GTR: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The side's rows `[M, G·R]`, zero outside their own adapter's columns, and the factor with zeros for NaN and inf.

    The rows of an adapter whose factor has those are NaN instead.
    """
    spoiled = (0 * factor).sum(dim=(1, 2), keepdim=True)  # NaN or 0
    others = ~torch.eye(len(factor), dtype=torch.bool, device=factor.device)[:, None, :, None]
    side = (side_GTR + spoiled)[:, :, None].masked_fill(others, 0)
    return side.flatten(2).flatten(0, 1), factor.nan_to_num(0, 0, 0)
