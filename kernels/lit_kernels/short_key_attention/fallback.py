"""The same with torch's fused attention; probabilities are written out only for a map."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_kernels.short_key_attention.reference import additive, by_heads


def short_key_attention(
    query_BTC: Tensor, key_BSC: Tensor, value_BSC: Tensor, heads: int, mask_BS: Tensor | None = None
) -> Tensor:
    """As `reference.short_key_attention`, without the map."""
    query, key, value = (by_heads(x, heads) for x in (query_BTC, key_BSC, value_BSC))
    mask = None if mask_BS is None else additive(mask_BS, query.dtype)[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


@torch.no_grad()
def short_key_map(query_BTC: Tensor, key_BSC: Tensor, heads: int, mask_BS: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The mean of the probabilities over the heads, `[B, T, S]`, computed in `dtype`."""
    query, key = (by_heads(x.to(dtype), heads) for x in (query_BTC, key_BSC))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask_BS is not None:
        scores += additive(mask_BS, dtype)[:, None, None]
    return torch.softmax(scores, dim=-1).nan_to_num_(nan=0.0).mean(dim=1)
