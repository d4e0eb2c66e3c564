"""Triton: h · GELU(g), elementwise; h and g are read once and nothing else is written but the result."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lit_kernels import dispatch
from lit_kernels.compiling import Shipped
from lit_kernels.frozen_geglu.function import key_of
from lit_kernels.tiles import Config, accumulator

TILES = (Config(4, 256, 0, 4, 3), Config(8, 256, 0, 4, 3))
"""Tiles, the default first; there a warp has one row and a thread 8 neighbours, 16 bytes in bf16. 256 divides every F
of SD and SDXL."""


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
    config = dispatch.tile(key_of(projected_MF), "forward", y.device, TILES)
    column_tiles = triton.cdiv(width, config.columns)
    frozen_geglu_forward[(triton.cdiv(rows, config.rows) * column_tiles,)](
        projected_MF, y, rows, width, projected_MF.stride(0), column_tiles,
        BM=config.rows, BN=config.columns, ACC=accumulator(y.dtype), num_warps=config.warps,
    )  # fmt: skip
    return y


def shipped() -> list[Shipped]:
    """Each tile, in bf16."""
    return [shipped_form(frozen_geglu_forward, ("projected", "y"), config) for config in TILES]


def shipped_form(kernel: triton.JITFunction, tensors: tuple[str, ...], config: Config) -> Shipped:
    """Of a kernel that takes these tensors, then sizes as above."""
    constants = {"BM": config.rows, "BN": config.columns, "ACC": tl.float32}
    sizes = dict.fromkeys(("m_rows", "width", "stride", "column_tiles"), "i32")
    signature = {**dict.fromkeys(tensors, "*bf16"), **sizes, **dict.fromkeys(constants, "constexpr")}
    divisible = (*tensors, "width", "stride")
    label = f"{config.rows}x{config.columns}"
    return Shipped(kernel, label, signature, constants, config.warps, config.stages, divisible, dots=False)
