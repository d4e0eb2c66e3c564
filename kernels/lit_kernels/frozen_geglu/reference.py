"""GEGLU by its definition, in any dtype up to fp64.

Legend: `F` width of the result; the input is twice as wide, hidden values beside their gates: [h | g].
"""

from __future__ import annotations

import torch
from torch import Tensor


def frozen_geglu(projected: Tensor) -> Tensor:
    """h · GELU(g) (Shazeer, 2020, arXiv 2002.05202, eq. 6, without its projections): `[..., 2F]` to `[..., F]`.

    GELU(g) = g Φ(g), with the exact Φ (Hendrycks and Gimpel, 2016, arXiv 1606.08415, section 2), as diffusers has it.
    """
    hidden, gate = projected.chunk(2, dim=-1)
    return hidden * torch.nn.functional.gelu(gate)
