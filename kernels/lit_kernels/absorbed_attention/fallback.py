"""The same in plain torch: all heads side by side, three launches."""

from __future__ import annotations

from torch import Tensor


def absorbed_attention(x_PTC: Tensor, keys_PNSC: Tensor, values_PNSC: Tensor) -> Tensor:
    """As `reference.absorbed_attention`."""
    scores = x_PTC @ keys_PNSC.flatten(1, 2).mT
    probabilities = scores.unflatten(2, keys_PNSC.shape[1:3]).softmax(dim=-1)
    return probabilities.flatten(2) @ values_PNSC.flatten(1, 2)
