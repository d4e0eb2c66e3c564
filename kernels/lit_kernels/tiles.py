"""What all Triton kernels share: the shape of a tile, and the dtype that sums are kept in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lit_kernels.dispatch import padded_rank as padded

__all__ = ["Config", "accumulator", "one_of", "padded"]


@dataclass(frozen=True)
class Config:
    """One compiled form: rows, columns and depth of a tile, and how it is run."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.depth}, {self.warps} warps, {self.stages} stages"


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """fp64 for fp64, fp32 for all others."""
    return tl.float64 if dtype == torch.float64 else tl.float32


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
