"""Triton: dh = dy · GELU(g) and dg = dy · h · (Φ(g) + g φ(g)), side by side; Φ(g) is computed again."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lit_kernels import dispatch
from lit_kernels.compiling import Shipped
from lit_kernels.frozen_geglu.forward import TILES, normal_cdf, shipped_form
from lit_kernels.frozen_geglu.function import key_of
from lit_kernels.tiles import accumulator


@triton.jit
def frozen_geglu_backward(
    projected, grad, found, m_rows, width, stride, column_tiles, BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr
):
    row = (tl.program_id(0) // column_tiles).to(tl.int64) * BM
    column = tl.program_id(0) % column_tiles * BN
    ms = tl.arange(0, BM)[:, None]
    ns = tl.arange(0, BN)[None, :]
    mask = (ms < m_rows - row) & (ns < width - column)
    at = projected + row * stride + column + ms * stride + ns
    h = tl.load(at, mask=mask, other=0.0).to(ACC)
    g = tl.load(at + width, mask=mask, other=0.0).to(ACC)
    dy = tl.load(grad + row * width + column + ms * width + ns, mask=mask, other=0.0).to(ACC)
    cdf = normal_cdf(g, ACC)
    density = tl.exp(g * g * -0.5) * tl.full((), 0.3989422804014327, ACC)  # φ, its peak 1 / √(2π)
    cd = found.dtype.element_ty
    found_at = found + row * 2 * width + column + ms * 2 * width + ns
    tl.store(found_at, (dy * (g * cdf)).to(cd), mask=mask)
    tl.store(found_at + width, (dy * h * (cdf + g * density)).to(cd), mask=mask)


def launch(projected_MF: Tensor, grad_MF: Tensor) -> Tensor:
    """[dh | dg] `[M, 2F]` of a contiguous dy `[M, F]`."""
    rows, width = grad_MF.shape
    found = grad_MF.new_empty((rows, 2 * width))
    config = dispatch.tile(key_of(projected_MF), "backward", found.device, TILES)
    column_tiles = triton.cdiv(width, config.columns)
    frozen_geglu_backward[(triton.cdiv(rows, config.rows) * column_tiles,)](
        projected_MF, grad_MF, found, rows, width, projected_MF.stride(0), column_tiles,
        BM=config.rows, BN=config.columns, ACC=accumulator(found.dtype), num_warps=config.warps,
    )  # fmt: skip
    return found


def shipped() -> list[Shipped]:
    """Each tile, in bf16."""
    return [shipped_form(frozen_geglu_backward, ("projected", "grad", "found"), config) for config in TILES]
