"""The forward diffusion process of a base: noising, targets and signal-to-noise ratios.

`alphas_cumprod` is the ᾱ_t of Ho et al. (2020); t counts 0 .. T-1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class NoiseSchedule:
    """ᾱ_t as fp32 `[T]` and what the UNet predicts."""

    alphas_cumprod: Tensor
    prediction_type: PredictionType = "epsilon"

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    @classmethod
    def of_scheduler(cls, scheduler: object) -> NoiseSchedule:
        """Take ᾱ and the prediction type from a diffusers scheduler."""
        prediction = scheduler.config.prediction_type  # type: ignore[attr-defined]
        if prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction type {prediction!r} is not supported; use epsilon or v_prediction")
        return cls(scheduler.alphas_cumprod.float(), prediction)  # type: ignore[attr-defined]

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.alphas_cumprod.to(like.device)[t].reshape(-1, *[1] * (like.ndim - 1))
        return alpha.sqrt(), (1 - alpha).sqrt()

    def add_noise(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t = √ᾱ_t z + √(1-ᾱ_t) ε (Ho et al., 2020, eq. 4). `t` int64 `[B]`."""
        signal, sigma = self._coefficients(t, z)
        return signal * z + sigma * noise

    def target(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the UNet should predict: ε, or v = √ᾱ_t ε - √(1-ᾱ_t) z (Salimans & Ho, 2022, app. D)."""
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = self._coefficients(t, z)
        return signal * noise - sigma * z

    def snr(self, t: Tensor) -> Tensor:
        """ᾱ_t / (1-ᾱ_t), `[B]`."""
        alpha = self.alphas_cumprod.to(t.device)[t]
        return alpha / (1 - alpha)

    def min_snr_weight(self, t: Tensor, gamma: float) -> Tensor:
        """Min-SNR-γ loss weights (Hang et al., 2023, eq. 8 and its v-prediction form), `[B]`.

        min(SNR, γ) / SNR of ε, written so that SNR = 0 gives 1; min(SNR, γ) / (SNR + 1) of v.
        """
        snr = self.snr(t)
        if self.prediction_type == "epsilon":
            return torch.clamp(gamma / snr, max=1)
        return torch.clamp(snr, max=gamma) / (snr + 1)
