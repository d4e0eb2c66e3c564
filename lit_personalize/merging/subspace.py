"""Sums in which later adapters keep out of the inputs that earlier ones answer.

ΔW_n x depends on the part of x in the row space of ΔW_n alone. With Q an orthonormal basis of the row spaces of all
earlier changes, ΔW_n (I - Q Qᵀ) is zero on them: there the merge acts exactly as it did before adapter n joined.

This is the subspace form of the orthogonality of Low-Rank Continual Personalization (Staniszewski et al., 2024, arXiv
2410.04891), which orthogonalises A column by column; row spaces do not become orthogonal by that, by this they do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_personalize.merging.truncation import ROUNDING, Cut, Factors, truncate


def row_space(factors: Factors, share: float = 1.0) -> Tensor:
    """Orthonormal basis `[in, k]` of the inputs that a change answers, or of the fewest with `share` of its energy."""
    if not factors.measured().energy:
        return factors.down.new_zeros(factors.down.shape[1], 0)
    return torch.linalg.qr(truncate(factors, Cut(energy=share)).down.T)[0]


def orthogonalize(parts: Sequence[Factors], protect: float = 1.0) -> list[Factors]:
    """Each change without what it does in the row spaces of those before it; the first stays as it is.

    Args:
        protect: Share of every change's energy whose inputs are kept free; 1 is all of them. A dense change of full
            rank leaves no room at 1.
    """
    done = [parts[0].measured()]
    basis = row_space(parts[0], protect)
    for part in parts[1:]:
        whole = part.measured().energy
        projected = Factors(part.up, part.down - (part.down @ basis) @ basis.T).measured()
        if projected.energy <= ROUNDING**2 * whole:  # what is left is rounding, with directions of its own
            projected = Factors(part.up, torch.zeros_like(part.down))
        done.append(projected)
        basis = torch.linalg.qr(torch.cat([basis, row_space(projected, protect)], 1))[0]
    return done
