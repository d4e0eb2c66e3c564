"""A linear layer with a LoRA for each share of the rows, by its definition, in any dtype up to fp64.

Legend: `M` rows, `K` and `N` width of the input and of the output, `G` adapters, `R` rank. Every sample of a batch has
as many rows as any other, so adapters share rows out equally and in order: row m has adapter m // (M / G).
"""

from __future__ import annotations

import torch
from torch import Tensor


def bank_lora(
    x_MK: Tensor,
    weight_NK: Tensor,
    downs_GRK: Tensor,
    ups_GNR: Tensor,
    scales_G: Tensor,
    bias_N: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + s_g · (x A_gᵀ) B_gᵀ, `[M, N]` (LoRA: Hu et al., 2021, arXiv 2106.09685, eq. 3)."""
    found = []
    for g, rows in enumerate(x_MK.tensor_split(len(downs_GRK))):
        y = rows @ weight_NK.T
        if bias_N is not None:
            y = y + bias_N
        found.append(y + scales_G[g] * (rows @ downs_GRK[g].T) @ ups_GNR[g].T)
    return torch.cat(found)
