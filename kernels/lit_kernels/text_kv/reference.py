"""K and V of every cross-attention layer from the same text, by their definition, in any dtype up to fp64.

Legend: `B` samples, `S` text tokens, `M = B·S` rows, `D` text width, `G` slices (a K or a V of one layer),
`C` width of a slice, `N = ΣC`, `R` rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def text_key_values(
    text_BSD: Tensor,
    weights: Sequence[Tensor],
    downs: Sequence[Tensor] = (),
    ups: Sequence[Tensor] = (),
    scales: Tensor | None = None,
    detach_first_token: bool = False,
) -> list[Tensor]:
    """y = x Wᵀ + s · (x Aᵀ) Bᵀ for each slice (LoRA: Hu et al., 2021, arXiv 2106.09685, eq. 3).

    Args:
        weights: W, `[C, D]` each; of another dtype they are cast to the text's.
        downs: A, `[R, D]` each; none for the projections alone.
        ups: B, `[C, R]` each.
        scales: s, `[G]`.
        detach_first_token: No gradient through what token 0 gives (Custom Diffusion's start token).

    Returns:
        One `[B, S, C]` a slice.
    """
    found = []
    for g, weight in enumerate(weights):
        y = text_BSD @ weight.to(text_BSD.dtype).T
        if downs and scales is not None:
            y = y + scales[g] * (text_BSD @ downs[g].T) @ ups[g].T
        if detach_first_token:
            y = torch.cat([y[:, :1].detach(), y[:, 1:]], dim=1)
        found.append(y)
    return found
