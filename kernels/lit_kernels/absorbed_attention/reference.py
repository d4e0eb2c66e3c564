"""A cross-attention layer and its absorbed form, by their definitions, in any dtype up to fp64.

Legend: `B` samples, `P` prompts, `T` image tokens, `S` text tokens, `N` heads, `H` head width, `I = N·H`, `C` width of
x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_kernels.attention.reference import attention


def attention_layer(
    x_BTC: Tensor,
    key_BSI: Tensor,
    value_BSI: Tensor,
    query_weight_IC: Tensor,
    out_weight_CI: Tensor,
    heads: int,
    out_bias_C: Tensor | None = None,
) -> Tensor:
    """What is absorbed: softmax(Q Kᵀ / √H) V of every head with Q = x W_qᵀ, then W_o (Vaswani et al., 2017, 3.2.2)."""
    query, key, value = (
        states.unflatten(-1, (heads, -1)).transpose(1, 2) for states in (x_BTC @ query_weight_IC.mT, key_BSI, value_BSI)
    )
    y = attention(query, key, value).transpose(1, 2).flatten(2) @ out_weight_CI.mT
    return y if out_bias_C is None else y + out_bias_C


def absorbed_attention(x_PTC: Tensor, keys_PNSC: Tensor, values_PNSC: Tensor) -> Tensor:
    """y = Σ_n softmax(x G_nᵀ) U_n, for tokens that share a prompt."""
    y = x_PTC.new_zeros(())
    for keys, values in zip(keys_PNSC.unbind(1), values_PNSC.unbind(1), strict=True):
        y = y + torch.softmax(x_PTC @ keys.mT, dim=-1) @ values
    return y
