"""The denoising objective: its draws, its conditioning and its loss.

L = E_{z, t, ε} ‖ target - f(z_t, t, c) ‖² (Ho et al., 2020, eq. 14; Rombach et al., 2022, eq. 2).
Subclasses change `sample_weights` or `loss`; the training step is that of every `Objective`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from lit_personalize import randomness
from lit_personalize.adapters.protocol import Adapter
from lit_personalize.backbones.base import Base, Conditioning
from lit_personalize.batch import Batch, Role
from lit_personalize.errors import UsageError
from lit_personalize.objectives.objective import Loss, Objective, OptimizerFactory, SchedulerFactory
from lit_personalize.objectives.text_states import StateStore, TextStates
from lit_personalize.randomness import Counter


class Denoising(Objective):
    """Fit adapters on a frozen base by the mean squared denoising error.

    Args:
        base: Diffusers directory, single-file checkpoint, or "tinyworld".
        adapters: What trains. Each has its own parameter group, with its own learning rate if it names one.
        optimizer: Takes parameter groups; None is AdamW.
        lr_scheduler: Takes the optimizer; steps every optimizer step.
        snr_gamma: γ of min-SNR weighting (Hang et al., 2023); None is off.
        noise_offset: k of ε + k·n with one n per sample and channel.
        caption_dropout: Share of samples whose caption is replaced by what the sampler's unconditional branch is told:
            the empty caption, or zeros where the base says so (SDXL's `force_zeros_for_empty_prompt`).
        timesteps: Range [low, high) from which t is drawn; None is all.
        zero_terminal_snr: Rescale the noise schedule so that its last step is noise alone (Lin et al., 2023, arXiv
            2305.08891, alg. 1), in training and in samples; for bases of v-prediction. With `snr_gamma` that step has
            weight 0.
        seed: Of every random draw of this objective.
        dtype: Of the frozen UNet and text encoders; trained parameters are always fp32.
        vae_dtype: Of the VAE; None is fp32 for SDXL in fp16, else `dtype`.
        base_config: Configs and tokenizers for a single-file base.
        gradient_checkpointing: Recompute UNet activations in the backward pass.
        kernels: Whether the UNet uses the operators of `lit_kernels`: "auto" on an NVIDIA GPU; "off" nowhere; or always
            a backend, "triton", "fallback" or "reference". The mathematics is the same, roundings are not.
    """

    def __init__(
        self,
        base: str,
        adapters: list[Adapter],
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: SchedulerFactory | None = None,
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
        caption_dropout: float = 0.0,
        timesteps: tuple[int, int] | None = None,
        seed: int = 0,
        dtype: str = "float32",
        vae_dtype: str | None = None,
        base_config: str | None = None,
        gradient_checkpointing: bool = False,
        zero_terminal_snr: bool = False,
        kernels: Literal["auto", "off", "triton", "fallback", "reference"] = "auto",
    ):
        base_options: dict[str, Any] = {"dtype": dtype, "vae_dtype": vae_dtype, "config": base_config}
        base_options["zero_terminal_snr"] = zero_terminal_snr
        optimizer = optimizer or torch.optim.AdamW
        super().__init__(base, adapters, optimizer, lr_scheduler, seed, base_options, gradient_checkpointing, kernels)
        self.snr_gamma = snr_gamma
        self.noise_offset = noise_offset
        self.caption_dropout = caption_dropout
        self.timesteps = timesteps
        self.zero_terminal_snr = zero_terminal_snr
        if snr_gamma is not None and not snr_gamma > 0:
            raise UsageError(f"snr_gamma must be positive, or null for none, not {snr_gamma}")
        if not 0 <= caption_dropout <= 1:
            raise UsageError(f"caption_dropout is a share between 0 and 1, not {caption_dropout}")
        if timesteps is not None and not 0 <= timesteps[0] < timesteps[1]:
            raise UsageError(f"timesteps [{timesteps[0]}, {timesteps[1]}) holds none: give [low, high) with low < high")
        self._states = TextStates()

    def options(self) -> dict[str, Any]:
        """What decides the loss besides data and seed, for a checkpoint to note."""
        names = ("snr_gamma", "noise_offset", "caption_dropout", "timesteps", "zero_terminal_snr")
        return {name: getattr(self, name) for name in names}

    def attach_to(self, base: Base) -> None:
        super().attach_to(base)
        last = len(self.built.schedule)
        if self.timesteps is not None and self.timesteps[1] > last:
            raise UsageError(f"timesteps end at {self.timesteps[1]}, and the base's noise schedule at {last}")

    # ---- drawing ----------------------------------------------------------------------------------

    def _key(self, purpose: str, batch: Batch, step: int) -> tuple[Counter, str, Counter, list[int]]:
        """What keys the draws of a batch: its samples' own seeds and steps, or those of this training."""
        seed: Counter = self.seed if batch.seed is None else batch.seed.tolist()
        return seed, purpose, step if batch.step is None else batch.step.tolist(), batch.position.tolist()

    def noise(self, purpose: str, shape: Sequence[int], batch: Batch, step: int) -> Tensor:
        """Normal draws `[B, *shape]` keyed by (seed, purpose, step, position), on the batch's device."""
        return randomness.normal(shape, *self._key(purpose, batch, step)).to(batch.device)

    def latents(self, batch: Batch, step: int) -> Tensor:
        """A draw from the VAE posterior, scaled for the UNet: `[B, C, h, w]`."""
        parts = [] if batch.pixels is None else [self.built.encode_pixels(batch.pixels)]
        if batch.latent_mean is not None and batch.latent_std is not None:
            parts.append((batch.latent_mean, batch.latent_std))
        mean, std = (torch.cat(values) if len(values) > 1 else values[0] for values in zip(*parts, strict=True))
        return self.built.scale_latents(mean + std * self.noise("vae", mean.shape[1:], batch, step))

    def draw_timesteps(self, batch: Batch, step: int) -> Tensor:
        """t ~ U{low, ..., high - 1} for every sample, int64 `[B]`; all timesteps of the schedule by default."""
        low, high = self.timesteps or (0, len(self.built.schedule))
        return randomness.integers(low, high, *self._key("timestep", batch, step)).to(batch.device)

    def draw_noise(self, z: Tensor, batch: Batch, step: int) -> Tensor:
        """ε ~ N(0, I) in the shape of `z` `[B, C, h, w]`, plus k·n with n ~ N(0, 1) `[B, C, 1, 1]` (noise offset)."""
        noise = self.noise("noise", z.shape[1:], batch, step)
        if self.noise_offset:
            noise = noise + self.noise_offset * self.noise("noise-offset", (z.shape[1], 1, 1), batch, step)
        return noise

    @property
    def trains_text(self) -> bool:
        return any(adapter.trains_text for adapter in self.trained)

    def conditioning(self, batch: Batch, step: int) -> Conditioning:
        """Text states of the batch, with gradients only if an adapter trains the text side."""
        base = self.built
        time_ids = batch.time_ids
        if base.needs_time_ids and time_ids is None:
            time_ids = base.default_time_ids(len(batch)).to(batch.device)
        if batch.text_states is not None:
            return Conditioning(batch.text_states, batch.pooled, time_ids)
        ids = cast(tuple[Tensor, ...], batch.input_ids)
        drop: Tensor | None = None
        if self.caption_dropout:
            draws = randomness.uniform(*self._key("caption-dropout", batch, step)).to(batch.device)
            drop = draws < self.caption_dropout
            blank = [empty.to(batch.device) for empty in base.tokenize([""])]
            ids = tuple(torch.where(drop[:, None], e, i) for e, i in zip(blank, ids, strict=True))
        if self.trains_text:
            states, pooled = base.encode_text(ids)
        else:
            states, pooled = self._states.of(base, ids)
        told = Conditioning(states, pooled, time_ids)
        return told.zeroed(drop) if drop is not None and base.force_zeros_for_empty_prompt else told

    def keep_states(self, captions: Sequence[str], store: StateStore) -> tuple[int, int]:
        """Take text states from a store that runs share; see `TextStates.keep`.

        Raises:
            UsageError: An adapter trains the text side: its states change at every step.
        """
        if self.trains_text:
            raise UsageError("text states cannot be kept: an adapter trains the text side and changes them every step")
        return self._states.keep(self.built, captions, store)

    # ---- the loss ---------------------------------------------------------------------------------

    def sample_weights(self, batch: Batch) -> Tensor:
        """Weights `[B]` of the reduction: the mean over the batch, or over each slot of a bank."""
        everyone = torch.ones(len(batch), dtype=torch.bool, device=batch.device)
        return 1.0 / batch.count_in_slot(everyone)

    def loss(self, batch: Batch, step: int) -> Loss:
        """Per-sample denoising losses with the draws of `step`."""
        base = self.built
        z = self.latents(batch, step)
        noise = self.draw_noise(z, batch, step)
        t = self.draw_timesteps(batch, step)
        z_t = base.schedule.add_noise(z, noise, t)
        prediction = base.predict(z_t, t, self.conditioning(batch, step), adapters=self.trained)
        per_sample = masked_mean((prediction - base.schedule.target(z, noise, t)).square(), batch.mask)
        if self.snr_gamma is not None:
            per_sample = per_sample * base.schedule.min_snr_weight(t, self.snr_gamma)
        return Loss(per_sample, self.sample_weights(batch), role_means(per_sample, batch))


def masked_mean(squared_error: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over channels and cells where `mask` `[B, 1, h, w]` is set: `[B, C, h, w]` -> `[B]`."""
    if mask is None:
        return squared_error.mean(dim=(1, 2, 3))
    inside = mask.sum(dim=(1, 2, 3)).clamp(min=1)
    return (squared_error * mask).sum(dim=(1, 2, 3)) / (inside * squared_error.shape[1])


def role_means(per_sample: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Mean loss of each role, for the log; nothing where the batch has only one."""
    present = set(batch.role.tolist())
    if len(present) == 1:
        return {}
    detached = per_sample.detach()
    roles = [Role(value) for value in sorted(present)]
    members = {role: batch.where(role).nonzero().flatten() for role in roles}  # numbers: also of a batch to plan with
    return {f"loss_{role.name.lower()}": detached[numbers].mean() for role, numbers in members.items()}
