"""The denoising objective, and what every objective shares: building, drawing, reducing, resuming.

L = E_{z, t, ε} ‖ target - f(z_t, t, c) ‖² (Ho et al., 2020, eq. 14; Rombach et al., 2022, eq. 2).
Subclasses change `sample_weights` or `loss`; the training step itself stays here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lit_personalize import randomness
from lit_personalize.adapters.protocol import Adapter
from lit_personalize.backbones.base import Base, Conditioning
from lit_personalize.backbones.loading import load_base
from lit_personalize.batch import Batch, Role
from lit_personalize.errors import DataError, UsageError

log = logging.getLogger(__name__)

OptimizerFactory = Callable[[Any], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], Any]


@dataclass
class Loss:
    """Per-sample losses and weights, both `[B]`; `terms` are scalars for the log."""

    per_sample: Tensor
    weights: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)

    def reduce(self) -> Tensor:
        """The one reduction: Σ_b weight_b · loss_b."""
        return (self.weights * self.per_sample).sum()


class Denoising(pl.LightningModule):
    """Fit adapters on a frozen base by the mean squared denoising error.

    Args:
        base: Diffusers directory, single-file checkpoint, or "tinyworld".
        adapters: What trains. Each has its own parameter group, with its own learning rate if it names one.
        optimizer: Takes parameter groups.
        lr_scheduler: Takes the optimizer; steps every optimizer step.
        snr_gamma: γ of min-SNR weighting (Hang et al., 2023); None is off.
        noise_offset: k of ε + k·n with one n per sample and channel.
        caption_dropout: Share of samples whose caption is replaced by what the sampler's unconditional branch is told:
            the empty caption, or zeros where the base says so (SDXL's `force_zeros_for_empty_prompt`).
        timesteps: Range [low, high) from which t is drawn; None is all.
        seed: Of every random draw of this objective.
        dtype: Of the frozen UNet and text encoders; trained parameters are always fp32.
        vae_dtype: Of the VAE; None is fp32 for SDXL in fp16, else `dtype`.
        base_config: Configs and tokenizers for a single-file base.
        gradient_checkpointing: Recompute UNet activations in the backward pass.
    """

    strict_loading = False  # frozen weights are not in checkpoints; load_state_dict checks the rest by hand

    def __init__(
        self,
        base: str,
        adapters: list[Adapter],
        optimizer: OptimizerFactory = torch.optim.AdamW,
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
    ):
        super().__init__()
        if not adapters:
            raise UsageError("model.adapters is empty: name at least one adapter to train")
        self.base_name = base
        self.adapters = nn.ModuleList(adapters)
        self.optimizer_factory = optimizer
        self.scheduler_factory = lr_scheduler
        self.snr_gamma = snr_gamma
        self.noise_offset = noise_offset
        self.caption_dropout = caption_dropout
        self.timesteps = timesteps
        self.seed = seed
        self.base_options: dict[str, Any] = {"dtype": dtype, "vae_dtype": vae_dtype, "config": base_config}
        self.gradient_checkpointing = gradient_checkpointing
        self.draws = 0
        """Training batches drawn so far; the step that keys every random draw."""
        self.base: Base | None = None
        self._states: dict[bytes, tuple[Tensor, Tensor | None]] = {}
        self._rates: dict[str, float] = {}
        self._figures: dict[str, Tensor] = {}

    # ---- building ---------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the base and attach the adapters; a second call does nothing.

        Weights are real and on the CPU whatever device the caller's context names ("meta", too), and
        the global generator is left as it was.
        """
        if self.base is not None:
            return
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            base = load_base(self.base_name, **self.base_options)
            for adapter in self.trained:
                adapter.attach(base, self.seed)
        if self.gradient_checkpointing:
            base.unet.enable_gradient_checkpointing()
        self.base = base

    @property
    def built(self) -> Base:
        """The loaded base with its adapters attached.

        Raises:
            RuntimeError: `configure_model` has not run yet.
        """
        if self.base is None:
            raise RuntimeError("configure_model has not run yet")
        return self.base

    @property
    def trained(self) -> list[Adapter]:
        """The adapters, in order."""
        return [cast(Adapter, adapter) for adapter in self.adapters]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group per adapter, with its name and the options that it has of its own."""
        groups = []
        for adapter in self.trained:
            group: dict[str, Any] = {"name": adapter.name, "params": list(adapter.factors.values())}
            group.update({k: v for k in ("lr", "weight_decay") if (v := getattr(adapter, k)) is not None})
            groups.append(group)
        return groups

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_factory(self.parameter_groups())
        self._rates = self._rates or rates_of(optimizer)
        if self.scheduler_factory is None:
            return optimizer
        scheduler = {"scheduler": self.scheduler_factory(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    # ---- drawing ----------------------------------------------------------------------------------

    def _positions(self, batch: Batch) -> list[int]:
        return batch.position.tolist()

    def noise(self, purpose: str, shape: Sequence[int], batch: Batch, step: int) -> Tensor:
        """Normal draws `[B, *shape]` keyed by (seed, purpose, step, position), on the batch's device."""
        return randomness.normal(shape, self.seed, purpose, step, self._positions(batch)).to(batch.device)

    def latents(self, batch: Batch, step: int) -> Tensor:
        """A draw from the VAE posterior, scaled for the UNet: `[B, C, h, w]`."""
        if batch.latent_mean is not None and batch.latent_std is not None:
            mean, std = batch.latent_mean, batch.latent_std
        else:
            mean, std = self.built.encode_pixels(cast(Tensor, batch.pixels))
        return self.built.scale_latents(mean + std * self.noise("vae", mean.shape[1:], batch, step))

    def draw_timesteps(self, batch: Batch, step: int) -> Tensor:
        """t ~ U{low, ..., high - 1} for every sample, int64 `[B]`; all timesteps of the schedule by default."""
        low, high = self.timesteps or (0, len(self.built.schedule))
        return randomness.integers(low, high, self.seed, "timestep", step, self._positions(batch)).to(batch.device)

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
            draws = randomness.uniform(self.seed, "caption-dropout", step, self._positions(batch)).to(batch.device)
            drop = draws < self.caption_dropout
            blank = [empty.to(batch.device) for empty in base.tokenize([""])]
            ids = tuple(torch.where(drop[:, None], e, i) for e, i in zip(blank, ids, strict=True))
        if self.trains_text:
            states, pooled = base.encode_text(ids)
        else:
            states, pooled = self._cached_states(ids)
        told = Conditioning(states, pooled, time_ids)
        return told.zeroed(drop) if drop is not None and base.force_zeros_for_empty_prompt else told

    @torch.no_grad()
    def _cached_states(self, ids: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Encode every distinct caption once, by itself; personalization repeats few of them.

        Encoded together, a caption's states would depend in the last bit on the others, which a resumed run meets
        in another order.
        """
        keys = [b"".join(i[b].cpu().numpy().tobytes() for i in ids) for b in range(len(ids[0]))]
        if len(self._states) > 4096:
            self._states.clear()
        for b, key in enumerate(keys):
            if key not in self._states:
                states, pooled = self.built.encode_text([i[b : b + 1] for i in ids])
                self._states[key] = (states[0], None if pooled is None else pooled[0])
        found = [self._states[key] for key in keys]
        pooled_rows = [p for _, p in found if p is not None]
        return torch.stack([s for s, _ in found]), torch.stack(pooled_rows) if pooled_rows else None

    # ---- the loss ---------------------------------------------------------------------------------

    def sample_weights(self, batch: Batch) -> Tensor:
        """Weights `[B]` of the reduction: the mean over the batch."""
        return torch.full((len(batch),), 1.0 / len(batch), device=batch.device)

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

    def transfer_batch_to_device(
        self, batch: Mapping[str, Any] | Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Build the typed batch, once for this module and all callbacks."""
        return Batch.of(batch).to(device)

    def training_step(self, batch: Mapping[str, Any] | Batch, batch_idx: int) -> Tensor:
        typed = Batch.of(batch)
        self._refresh()
        loss = self.loss(typed, self.draws)
        self.draws += 1
        total = loss.reduce()
        self._figures = {"loss": total.detach(), **loss.terms}
        return total

    def on_train_batch_end(self, outputs: Any, batch: Mapping[str, Any] | Batch, batch_idx: int) -> None:
        """Log the step's losses if the loggers write them: `log` takes as long as some layers of a small UNet.

        Callbacks have run by now, so a training that one of them ends is known to write its last step.
        """
        trainer = self.trainer
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.should_stop or trainer.is_last_batch or (every and trainer.global_step % every == 0):
            for name, value in self._figures.items():
                self.log(name, value, prog_bar=name == "loss", batch_size=len(Batch.of(batch)))

    def validation_step(self, batch: Mapping[str, Any] | Batch, batch_idx: int) -> None:
        """Held-out loss with draws that depend on the batch only, so that steps can be compared."""
        typed = Batch.of(batch)
        self._refresh()  # the optimizer moved the factors after the last training step cast them
        loss = self.loss(typed, batch_idx)
        self.log("val_loss", loss.reduce(), prog_bar=True, batch_size=len(typed))

    def _refresh(self) -> None:
        for adapter in self.trained:
            adapter.refresh(self.built.dtype)

    # ---- checkpoints ------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Only what trains."""
        full = super().state_dict(*args, **kwargs)
        return {key: value for key, value in full.items() if key.startswith("adapters.")}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load exactly the trained tensors.

        Raises:
            DataError: Names or shapes are not those of this run's adapters.
        """
        self._refuse_other_adapters(state_dict)
        return super().load_state_dict(dict(state_dict), strict=False, assign=assign)

    def _refuse_other_adapters(self, state_dict: Mapping[str, Any]) -> None:
        own = self.state_dict()
        if set(own) != set(state_dict):
            missing, unknown = sorted(set(own) - set(state_dict)), sorted(set(state_dict) - set(own))
            raise DataError(f"checkpoint of other adapters: missing {missing[:3]}, unknown {unknown[:3]}")
        if wrong := [k for k, v in own.items() if v.shape != state_dict[k].shape]:
            raise DataError(f"checkpoint of other adapters: {wrong[0]} has another shape")

    def options(self) -> dict[str, Any]:
        """What decides the loss besides data and seed, for a checkpoint to note."""
        names = ("snr_gamma", "noise_offset", "caption_dropout", "timesteps")
        return {name: getattr(self, name) for name in names}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["litp"] = {
            "draws": self.draws, "base_fingerprint": self.built.fingerprint, "seed": self.seed,
            "options": self.options(), "lr": self._rates,
        }  # fmt: skip

    def check_resumable(self, checkpoint: Mapping[str, Any]) -> None:
        """Compare a checkpoint with this run; options that differ but can be gone on with are warned of.

        Raises:
            DataError: It is of another base or of other adapters.
            UsageError: It was drawn with another seed.
        """
        state = checkpoint["litp"]
        if state["base_fingerprint"] != self.built.fingerprint:
            raise DataError(
                f"the checkpoint was trained on base {state['base_fingerprint']}, this run has "
                f"{self.built.fingerprint} ({self.base_name}); use the same base or a new run name"
            )
        if state["seed"] != self.seed:
            raise UsageError(f"the run was started with seed {state['seed']}, not {self.seed}; use a new run name")
        if "state_dict" in checkpoint:
            self._refuse_other_adapters(checkpoint["state_dict"])
        for name, value in self.options().items():
            if (before := state.get("options", {}).get(name, value)) != value:
                log.warning(
                    "model.%s was %r when the checkpoint was written and is %r now: the run goes on, "
                    "but is not the one that it would have been", name, before, value,
                )  # fmt: skip
        for name, rate in rates_of(self.optimizer_factory(self.parameter_groups())).items():
            if (kept := state.get("lr", {}).get(name, rate)) != rate:
                log.warning(
                    "the learning rate of %s was %g when the checkpoint was written and is %g now: the run goes on "
                    "with %g, which the optimizer keeps; use a new run name for another", name, kept, rate, kept,
                )  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_resumable(checkpoint)
        state = checkpoint["litp"]
        self.draws = state["draws"]
        self._rates = dict(state.get("lr", {}))


def rates_of(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Learning rates by the names of the parameter groups."""
    return {group["name"]: float(group["lr"]) for group in optimizer.param_groups}


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
    return {f"loss_{role.name.lower()}": detached[batch.where(role)].mean() for role in roles}
