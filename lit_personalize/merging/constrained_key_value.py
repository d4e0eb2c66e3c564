"""The closed-form merge of Custom Diffusion (Kumari et al., 2022, arXiv 2212.04488, sec. 3.3, eq. 5 to 8).

For every K or V matrix W0 of cross-attention, the W nearest to it on regularization captions that maps the target
states of all concepts to what each concept's own matrix makes of them:

    min ||(W - W0) C_reg^T||_F  subject to  W C^T = V^T

With G = C_reg^T C_reg and D = C G^-1, which no layer changes: W = W0 + (V^T - W0 C^T)(D C^T)^-1 D, a change of rank s.
Since row i of V is (W0 + ΔW_n) c_i, V^T - W0 C^T is ΔW_n c_i in column i: W0 itself is not needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_personalize.errors import UsageError

SINGULAR = 1e-12
"""Smallest pivot, relative to the largest, of a matrix that counts as regular in fp64."""


class ConstrainedMerge:
    """The part of the solution that all layers share, factored once, in fp64.

    Args:
        regularization: C_reg, text states `[n, d]` of captions in which nothing should change.
        targets: C, text states `[s, d]` of the concepts' words.
        ridge: λ of G + λ·mean(diag G)·I, for fewer independent states than d; 0 solves the paper's problem.

    Raises:
        UsageError: The captions do not span the states, or targets repeat each other.
    """

    def __init__(self, regularization: Tensor, targets: Tensor, ridge: float = 0.0):
        states, self.targets = regularization.double(), targets.double()
        if states.shape[1] != targets.shape[1]:
            raise UsageError(f"states are {states.shape[1]} wide, targets {targets.shape[1]}: of different encoders")
        gram = states.T @ states
        if ridge:
            gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        factor, failed = torch.linalg.cholesky_ex(gram)
        pivots = factor.diagonal() ** 2
        if failed or pivots.min() <= SINGULAR * pivots.max():
            spread = torch.linalg.eigvalsh(gram)
            rank = int((spread > SINGULAR * spread.max()).sum())
            raise UsageError(
                f"{len(states)} states of the regularization captions span {rank} of {states.shape[1]} dimensions: "
                "give more captions, or a ridge such as 1e-6"
            )
        directions = torch.cholesky_solve(self.targets.T, factor)
        inner = directions.T @ self.targets.T
        self._inner, failed = torch.linalg.cholesky_ex((inner + inner.T) / 2)
        pivots = self._inner.diagonal() ** 2
        if failed or pivots.min() <= SINGULAR * pivots.max():
            raise UsageError(f"the {len(targets)} target states depend on each other: give each word once")
        # D = R^T A: with orthonormal rows of A the factors keep their precision in fp32.
        basis, self._triangle = torch.linalg.qr(directions)
        self.down = basis.T.contiguous()
        """A, fp64 `[s, d]`, the same for every layer."""

    def up(self, changes: Tensor) -> Tensor:
        """B `[o, s]` with W = W0 + B A, fp64: an exact LoRA of rank s.

        Args:
            changes: `[s, o]`; row i is ΔW_n c_i, by which the concept of target i changes what W0 makes of it.
        """
        return torch.cholesky_solve(changes.double(), self._inner).T @ self._triangle.T
