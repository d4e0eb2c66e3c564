"""Attention by its definition, in plain torch, for any dtype up to fp64.

Legend: `B` batch, `T` query tokens, `S` key tokens, `N` heads, `H` head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention_probabilities(query_BNTH: Tensor, key_BNSH: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(Q Kᵀ / sqrt(H) + mask) (Vaswani et al., 2017, eq. 1): `[B, N, T, S]`."""
    scores = query_BNTH @ key_BNSH.transpose(-1, -2) / math.sqrt(query_BNTH.shape[-1])
    return torch.softmax(scores if mask is None else scores + mask, dim=-1)


def attention(query_BNTH: Tensor, key_BNSH: Tensor, value_BNSH: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention output `[B, N, T, H]`; `mask` is additive and broadcasts to `[B, N, T, S]`."""
    return attention_probabilities(query_BNTH, key_BNSH, mask) @ value_BNSH


def detach_first_token(states_BSC: Tensor) -> Tensor:
    """The same values, without a gradient through token 0 (Custom Diffusion's start token)."""
    return torch.cat([states_BSC[:, :1].detach(), states_BSC[:, 1:]], dim=1)
