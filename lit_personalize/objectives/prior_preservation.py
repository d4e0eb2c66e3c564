"""Prior preservation (DreamBooth, Ruiz et al., 2022, arXiv 2208.12242, eq. 2).

L = mean over instances + λ · mean over prior samples. Each role is normalised by its own count, so
the two may have different numbers of samples, and the gradient equals that of two separate passes.
Custom Diffusion uses the same loss with retrieved pictures as the prior.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_personalize.batch import Batch, Role
from lit_personalize.errors import UsageError
from lit_personalize.objectives.denoising import Denoising


class PriorPreservation(Denoising):
    """Denoising with λ-weighted prior (or replay) samples in every batch.

    Args:
        prior_weight: λ. Our masked mean divides by the channels, too; the diffusers port of Custom
            Diffusion does not, which makes its λ = 1 equal to λ = 0.25 here (0.125 with 8 channels).
        kwargs: Options of `Denoising`.
    """

    def __init__(self, *args: Any, prior_weight: float = 1.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if prior_weight < 0:
            raise UsageError(f"prior_weight must not be negative, got {prior_weight}")
        self.prior_weight = prior_weight

    def options(self) -> dict[str, Any]:
        return {**super().options(), "prior_weight": self.prior_weight}

    def sample_weights(self, batch: Batch) -> Tensor:
        instance = batch.where(Role.INSTANCE)
        counted = batch.count_in_slot(instance)
        if not bool(counted.all()):
            raise ValueError("a batch for prior preservation has no instance sample")
        weights = instance / counted
        for role in (Role.PRIOR, Role.REPLAY):
            members = batch.where(role)
            weights = weights + self.prior_weight * members / batch.count_in_slot(members).clamp(min=1)
        return weights.to(torch.float32)
