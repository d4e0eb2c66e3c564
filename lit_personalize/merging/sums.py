"""Weighted sums of adapters, ΔW = Σ_n w_n ΔW_n, and what of them fits a smaller rank.

Every sum is exact before it is truncated: factors stand side by side, [w_1 B_1 ... w_N B_N][A_1; ...; A_N]. Adding
the A's and the B's (PEFT's "linear") is another operation: (ΣB)(ΣA) has the cross terms B_1 A_2 + B_2 A_1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lit_personalize.merging.truncation import Cut, Factors, truncate


def concatenate(parts: Sequence[Factors]) -> Factors:
    """The exact sum with all ranks side by side."""
    return Factors(torch.cat([p.up for p in parts], 1), torch.cat([p.down for p in parts])).measured()


def weighted_sum(parts: Sequence[Factors], cut: Cut) -> Factors:
    """The sum at the rank that `cut` says; uncut at its own rank, which is smaller where adapters share directions."""
    return truncate(concatenate(parts), cut)
