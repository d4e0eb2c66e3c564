"""Attention to few keys by its definition, in any dtype up to fp64, and the mean of its probabilities over heads.

Legend: `B` samples, `T` query tokens, `S` key tokens, `N` heads, `H` head width, `C = N·H`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def short_key_attention(
    query_BTC: Tensor, key_BSC: Tensor, value_BSC: Tensor, heads: int, mask_BS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(Q Kᵀ / sqrt(H) + mask) V of every head (Vaswani et al., 2017, eq. 1).

    A sample whose keys are all masked gets zeros, as `F.scaled_dot_product_attention` gives.

    Args:
        mask_BS: Boolean (True: the key takes part) or added to the scores; the same for all heads and queries.

    Returns:
        The output `[B, T, C]` and the mean of the probabilities over the heads, `[B, T, S]`.
    """
    query, key, value = (by_heads(x, heads) for x in (query_BTC, key_BSC, value_BSC))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask_BS is None:
        p = torch.softmax(scores, dim=-1)
    else:
        mask = additive(mask_BS, scores.dtype)
        empty = mask.isneginf().all(dim=1, keepdim=True)
        p = torch.softmax(scores + mask.masked_fill(empty, 0)[:, None, None], dim=-1)
        p = p * ~empty[:, None, None]
    return (p @ value).transpose(1, 2).flatten(2), p.mean(dim=1)


def by_heads(x_BTC: Tensor, heads: int) -> Tensor:
    """`[B, N, T, H]`, a view."""
    return x_BTC.unflatten(-1, (heads, -1)).transpose(1, 2)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 and -inf for a boolean mask, else the mask; without a gradient."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))
    return mask.detach().to(dtype)
