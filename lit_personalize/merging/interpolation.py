"""Adapters between two adapters: changes and token rows at a share α, exact at both ends.

ΔW_α = (1 - α)·ΔW_1 + α·ΔW_2 as factors side by side; never the factors themselves, whose product is not linear in α.
Rows of tokens are mixed and get the mixed norm: v_α = (1 - α)·v_1 + α·v_2, scaled to (1 - α)·‖v_1‖ + α·‖v_2‖. Half-way
this is the mean norm; a straight mixture of two rows that point apart would be too short for the text encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lit_personalize.adapters.protocol import AdapterWeights, LowRank
from lit_personalize.errors import DataError, UsageError

Rows = list[Tensor]
"""One `[n, d]` per text encoder."""


def interpolate(first: AdapterWeights, second: AdapterWeights, alpha: float, token: str = "") -> AdapterWeights:
    """The adapter at share `alpha` of the second; 0 is the first and 1 the second, bit for bit.

    Args:
        token: Name of the mixed token where each adapter has one; by default the first's. At 0 and 1, too.

    Raises:
        UsageError: `alpha` lies outside of [0, 1].
        DataError: Tokens that do not pair up: other names and more than one, or other numbers of rows.
    """
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha is the share of the second adapter, in [0, 1], not {alpha}")
    low_rank = {}
    for layer in dict.fromkeys([*first.low_rank, *second.low_rank]):
        parts = [(f, s) for f, s in ((first.low_rank.get(layer), 1 - alpha), (second.low_rank.get(layer), alpha)) if f]
        if scaled := [_scaled(factors, share) for factors, share in parts if share]:
            low_rank[layer] = scaled[0] if len(scaled) == 1 else scaled[0].concatenate(scaled[1])
    dense = {}
    for layer in dict.fromkeys([*first.dense, *second.dense]):
        one, other = first.dense.get(layer), second.dense.get(layer)
        if one is not None and other is not None:
            dense[layer] = torch.lerp(one, other, alpha)
        elif one is not None and alpha < 1:
            dense[layer] = (1 - alpha) * one
        elif other is not None and alpha > 0:
            dense[layer] = alpha * other
    tokens = _mixed_tokens(first.tokens, second.tokens, alpha, token)
    return AdapterWeights(low_rank=low_rank, dense=dense, tokens=tokens)


def _scaled(factors: LowRank, share: float) -> LowRank:
    return factors if share == 1 else replace(factors, alpha=factors.alpha * share)


def _mixed_tokens(first: Mapping[str, Rows], second: Mapping[str, Rows], alpha: float, token: str) -> dict[str, Rows]:
    if not first and not second:
        return {}
    if len(first) == len(second) == 1:
        pairs = {token or next(iter(first)): (next(iter(first.values())), next(iter(second.values())))}
    elif set(first) == set(second) and not token:
        pairs = {name: (rows, second[name]) for name, rows in first.items()}
    else:
        raise DataError(
            f"tokens {', '.join(first) or 'none'} and {', '.join(second) or 'none'} do not pair up: give adapters of "
            "one token each, or of the same tokens"
        )
    return {name: mixed_rows(one, other, alpha, name) for name, (one, other) in pairs.items()}


def mixed_rows(first: Rows, second: Rows, alpha: float, token: str) -> Rows:
    """Rows between those of two tokens, per text encoder.

    Raises:
        DataError: They have other numbers of rows, or other widths.
    """
    shapes = [[tuple(rows.shape) for rows in own] for own in (first, second)]
    if shapes[0] != shapes[1]:
        raise DataError(f"token {token}: rows of shapes {shapes[0]} and {shapes[1]} cannot be mixed")
    found = []
    for a, b in zip(first, second, strict=True):
        if alpha in (0, 1):
            found.append((a if alpha == 0 else b).clone())
            continue
        line = torch.lerp(a, b, alpha)
        wanted = torch.lerp(a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True), alpha)
        found.append(line * wanted / line.norm(dim=1, keepdim=True).clamp(min=torch.finfo(line.dtype).tiny))
    return found
