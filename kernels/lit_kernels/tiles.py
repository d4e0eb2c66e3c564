"""What all Triton kernels share: the shape of a tile, and the dtype that sums are kept in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Config:
    """One compiled form: rows, columns and depth of a tile, and how it is run."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """fp64 for fp64, fp32 for all others."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def padded(rank: int) -> int:
    """A rank as a side of a product on tensor cores: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(rank))


@triton.jit
def one_of(which, first, second, third, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The pointer of part `which` of up to three; with one part there is nothing to choose."""
    found = first
    if PARTS > 1:
        if which == 1:
            found = second
    if PARTS > 2:
        if which == 2:
            found = third
    return found
