"""The merged adapter draws each subject as its own LoRA would (ZipLoRA, Shah et al., 2023, arXiv 2311.13600, eq. 3).

L = mean over content ‖f_merged - f_content‖² + mean over style ‖f_merged - f_style‖² + λ · similarity of the mergers,
where f are predictions for the same z_t and t. The first concept's pictures are the content's, the second's the
style's.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from lit_personalize.adapters.ziplora import PARTS, Similarity, ZipLoRA
from lit_personalize.batch import Batch
from lit_personalize.errors import UsageError
from lit_personalize.objectives.denoising import Denoising, masked_mean
from lit_personalize.objectives.objective import Loss


class MergedDistillation(Denoising):
    """Distil two LoRAs into their merger.

    Args:
        similarity_weight: λ.
        similarity: "dot" is the paper's sum over layers of |m_c · m_s|; since distances are means here and squared
            norms there, it is divided by the values of a latent. "elementwise" is a common port's, beside means.
        kwargs: Options of `Denoising`.
    """

    def __init__(self, *args: Any, similarity_weight: float = 0.01, similarity: Similarity = "dot", **kwargs: Any):
        super().__init__(*args, **kwargs)
        if similarity_weight < 0:
            raise UsageError(f"similarity_weight must not be negative, got {similarity_weight}")
        if len(self.trained) != 1 or not isinstance(self.trained[0], ZipLoRA):
            raise UsageError("MergedDistillation trains one ZipLoRA adapter, and nothing else")
        self.similarity_weight = similarity_weight
        self.similarity = similarity

    def options(self) -> dict[str, Any]:
        own = {"similarity_weight": self.similarity_weight, "similarity": self.similarity}
        return {**super().options(), **own}

    def sample_weights(self, batch: Batch) -> Tensor:
        """Each concept's samples weigh 1 together."""
        concept = self._concepts(batch)
        members = concept[:, None] == concept
        return 1.0 / members.sum(1).to(torch.float32)

    def _concepts(self, batch: Batch) -> Tensor:
        if batch.concept is None or not bool(((batch.concept == 0) | (batch.concept == 1)).all()):
            raise UsageError("ZipLoRA takes two concepts, the content's pictures first and the style's second")
        return batch.concept

    def loss(self, batch: Batch, step: int) -> Loss:
        """Per-sample distances `[B]` with the draws of `step`; the similarity is spread over the batch."""
        base, adapter = self.built, cast(ZipLoRA, self.trained[0])
        concept = self._concepts(batch)
        z = self.latents(batch, step)
        t = self.draw_timesteps(batch, step)
        z_t = base.schedule.add_noise(z, self.draw_noise(z, batch, step), t)
        told = self.conditioning(batch, step)
        wanted = torch.zeros_like(z_t)
        try:
            for number, part in enumerate(PARTS):
                rows = (concept == number).nonzero().flatten()
                if len(rows):
                    adapter.show(part)
                    with torch.no_grad():
                        wanted[rows] = base.predict(z_t[rows], t[rows], told.of(rows), adapters=[adapter])
        finally:
            adapter.show(None)
        got = base.predict(z_t, t, told, adapters=[adapter])
        distance = masked_mean((got - wanted).square(), batch.mask)
        similarity = adapter.similarity(self.similarity) / (z[0].numel() if self.similarity == "dot" else 1)
        weights = self.sample_weights(batch)
        per_sample = distance + self.similarity_weight * similarity / weights.sum()
        moves = [(factor.detach() - 1).square().mean() for factor in adapter.factors.values()]
        terms = {"distance": (weights * distance).sum().detach(), "similarity": similarity.detach()}
        terms["moved"] = torch.stack(moves).mean().sqrt()
        return Loss(per_sample, weights, terms)
