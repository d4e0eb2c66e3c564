"""VAE posteriors of pictures whose views do not change, encoded once and kept in memory.

Mean and standard deviation are kept rather than a draw: every step still draws its own latent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lit_datamodules.concept_folder import Sample
from lit_datamodules.protocols import ImageEncoder
from lit_datamodules.training_view import Geometry, pixels_of, still

CHUNK = 4  # pictures per pass of the VAE, whose activations are large


class LatentCache:
    """Posteriors by (sample number, mirrored); mirror images are kept only of samples that are mirrored."""

    def __init__(self, samples: Sequence[Sample], geometry: Geometry, encoder: ImageEncoder):
        keys = [(i, flip) for i, s in enumerate(samples) for flip in ((False, True) if s.flip else (False,))]
        self._posteriors: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}
        for start in range(0, len(keys), CHUNK):
            chunk = keys[start : start + CHUNK]
            views = [pixels_of(samples[i], still(samples[i], geometry, flip)) for i, flip in chunk]
            mean, std = encoder.encode_pixels(torch.from_numpy(np.stack(views)))
            for key, m, s in zip(chunk, mean.float().cpu(), std.float().cpu(), strict=True):
                self._posteriors[key] = (m.clone(), s.clone())

    def __len__(self) -> int:
        return len(self._posteriors)

    def batch(self, keys: Sequence[tuple[int, bool]]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, fp32 `[len(keys), C, h, w]`."""
        means, deviations = zip(*(self._posteriors[key] for key in keys), strict=True)
        return torch.stack(means), torch.stack(deviations)
