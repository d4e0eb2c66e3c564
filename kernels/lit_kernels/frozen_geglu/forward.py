"""Triton: h · GELU(g), elementwise; h and g are read once and nothing else is written but the result."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lit_kernels.compiling import Shipped
from lit_kernels.tiles import accumulator

ROWS, COLUMNS, WARPS = 4, 256, 4
"""A tile; a warp has one row of it and a thread 8 neighbours, 16 bytes in bf16. 256 divides every F of SD and SDXL."""


@triton.jit
def normal_cdf(g, ACC: tl.constexpr):
    """Φ, the cumulative distribution of the standard normal."""
    root_half = tl.full((), 0.7071067811865476, ACC)
    return (1.0 + tl.erf(g * root_half)) * 0.5


@triton.jit
def frozen_geglu_forward(
    projected, y, m_rows, width, stride, column_tiles, BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr
):
    row = (tl.program_id(0) // column_tiles).to(tl.int64) * BM
    column = tl.program_id(0) % column_tiles * BN
    ms = tl.arange(0, BM)[:, None]
    ns = tl.arange(0, BN)[None, :]
    mask = (ms < m_rows - row) & (ns < width - column)
    at = projected + row * stride + column + ms * stride + ns
    h = tl.load(at, mask=mask, other=0.0).to(ACC)
    g = tl.load(at + width, mask=mask, other=0.0).to(ACC)
    found = h * (g * normal_cdf(g, ACC))
    tl.store(y + row * width + column + ms * width + ns, found.to(y.dtype.element_ty), mask=mask)


def launch(projected_MF: Tensor) -> Tensor:
    """y `[M, F]` of `[M, 2F]`, whose rows may stand apart."""
    rows, width = len(projected_MF), projected_MF.shape[1] // 2
    y = projected_MF.new_empty((rows, width))
    column_tiles = triton.cdiv(width, COLUMNS)
    frozen_geglu_forward[(triton.cdiv(rows, ROWS) * column_tiles,)](
        projected_MF, y, rows, width, projected_MF.stride(0), column_tiles,
        BM=ROWS, BN=COLUMNS, ACC=accumulator(y.dtype), num_warps=WARPS,
    )  # fmt: skip
    return y


def shipped() -> list[Shipped]:
    """One form, in bf16."""
    return [shipped_form(frozen_geglu_forward, ("projected", "y"))]


def shipped_form(kernel: triton.JITFunction, tensors: tuple[str, ...]) -> Shipped:
    """Of a kernel that takes these tensors, then sizes as above."""
    constants = {"BM": ROWS, "BN": COLUMNS, "ACC": tl.float32}
    sizes = dict.fromkeys(("m_rows", "width", "stride", "column_tiles"), "i32")
    signature = {**dict.fromkeys(tensors, "*bf16"), **sizes, **dict.fromkeys(constants, "constexpr")}
    divisible = (*tensors, "width", "stride")
    return Shipped(kernel, f"{ROWS}x{COLUMNS}", signature, constants, WARPS, 3, divisible, dots=False)
