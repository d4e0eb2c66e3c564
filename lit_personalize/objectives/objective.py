"""What every objective shares: building, optimizer groups, the training step, logging and resuming.

Subclasses say how a batch becomes a `Loss`; they reach adapters only through their protocol.
"""

from __future__ import annotations

import logging
import sys
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

import lit_kernels
from lit_kernels.patching import Operator
from lit_personalize import sharding
from lit_personalize.adapters.protocol import Adapter
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.batch import Batch
from lit_personalize.errors import DataError, UsageError

log = logging.getLogger(__name__)

OptimizerFactory = Callable[[Any], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


@dataclass
class Loss:
    """Per-sample losses and weights, both `[B]`; `terms` are scalars for the log."""

    per_sample: Tensor
    weights: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)

    def reduce(self) -> Tensor:
        """The one reduction: Σ_b weight_b · loss_b."""
        return (self.weights * self.per_sample).sum()


class Objective(pl.LightningModule):
    """A loss over adapters on a frozen base; see `Denoising` for the options."""

    strict_loading = False  # frozen weights are not in checkpoints; load_state_dict checks the rest by hand

    def __init__(
        self,
        base: str,
        adapters: list[Adapter],
        optimizer: OptimizerFactory,
        lr_scheduler: SchedulerFactory | None,
        seed: int,
        base_options: dict[str, Any],
        gradient_checkpointing: bool,
        kernels: str,
    ):
        super().__init__()
        if not adapters:
            raise UsageError("model.adapters is empty: name at least one adapter to train")
        self.base_name = base
        self.adapters = nn.ModuleList(adapters)
        self.optimizer_factory = optimizer
        self.scheduler_factory = lr_scheduler
        self.seed = seed
        self.base_options = base_options
        self.gradient_checkpointing = gradient_checkpointing
        self.kernels = kernels
        self.draws = 0
        """Training batches drawn so far; the step that keys every random draw."""
        self.base: Base | None = None
        self._rates: dict[str, float] = {}
        self._spans: dict[str, list[int]] = {}
        self._steps = 0
        self._figures: dict[str, Tensor] = {}
        self.placed: dict[str, str] = {}
        """Of a sharded training: names of trained parameters of the base, and those that they have elsewhere."""
        self.sharded = False
        """Whether a rank holds only its share of the base: what needs the base is then done by all ranks together."""
        self.spread = False
        """Whether the training's strategy leaves shares of what trains in this process, and nothing whole."""
        self.replicated: list[Adapter] = []
        """Adapters that a sharding strategy leaves alone: their gradients are averaged here."""
        self.register_state_dict_post_hook(_only_what_trains)

    @abstractmethod
    def loss(self, batch: Batch, step: int) -> Loss:
        """Per-sample losses with the draws of `step`."""

    # ---- building ---------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the base and attach the adapters; a second call does nothing.

        Weights are real and on the CPU whatever device the caller's context names ("meta", too), and
        the global generator is left as it was.
        """
        if self.base is None:
            with torch.device("cpu"), torch.random.fork_rng(devices=[]):
                self.attach_to(load_base(self.base_name, **self.base_options))
        if self.device_mesh is not None and not self.sharded:
            self.place_factors()
            sharding.shard(self.built, self.device_mesh["data_parallel"])

    def attach_to(self, base: Base) -> None:
        """Take a base, which may have no weights, and attach the adapters."""
        for adapter in self.trained:
            adapter.attach(base, self.seed)
        self._refuse_shared_layers()
        if self.gradient_checkpointing:
            base.unet.enable_gradient_checkpointing()
        self.base = base

    def place_factors(self) -> None:
        """Prepare for a strategy that keeps shares of the base: whole-weight changes go into their layers."""
        numbers = {adapter.name: i for i, adapter in enumerate(self.trained)}
        found = sharding.place(self.built, self.trained)
        self.placed = {f"base.{n}": f"adapters.{numbers[name]}.factors.{key}" for n, (name, key) in found.items()}
        self.sharded = True

    def _refuse_shared_layers(self) -> None:
        for alone in (a for a in self.trained if not a.shares_layers):
            for other in (a for a in self.trained if a is not alone):
                if both := set(alone.layers()) & set(other.layers()):
                    raise UsageError(
                        f"{alone.name} rescales the weights of its layers, and {other.name} changes {min(both)}, too: "
                        "give them different layers, or do without use_dora"
                    )

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
        """The groups of every adapter, in order."""
        return [group for adapter in self.trained for group in adapter.parameter_groups()]

    def build_optimizer(self, groups: Sequence[dict[str, Any]] | None = None) -> torch.optim.Optimizer:
        """A new optimizer over all groups, each at its own learning rate.

        Args:
            groups: Other ones than `parameter_groups`.

        Raises:
            UsageError: A group asks for a multiple of a learning rate that the optimizer chooses by itself.
        """
        optimizer = self.optimizer_factory(self.parameter_groups() if groups is None else groups)
        for group in optimizer.param_groups:
            ratio = group.pop("lr_ratio", None)
            if ratio is not None and group["lr"] is None:
                raise UsageError(f"{group['name']} has lr_ratio: give the optimizer or the adapter a learning rate")
            if ratio is not None:
                group["lr"] *= ratio
        return optimizer

    def configure_optimizers(self) -> Any:
        optimizer = self.build_optimizer()
        self._rates = self._rates or rates_of(optimizer)
        if self.scheduler_factory is None:
            return optimizer
        scheduler = {"scheduler": self.scheduler_factory(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    # ---- steps ------------------------------------------------------------------------------------

    def transfer_batch_to_device(
        self, batch: Mapping[str, Any] | Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Build the typed batch, once for this module and all callbacks."""
        return Batch.of(batch).to(device)

    def on_train_start(self) -> None:
        """Count the optimizer steps of the whole training, of which adapters take their shares; fuse the UNet."""
        self.fuse_kernels()
        if self.replicated:
            optimizer = cast(torch.optim.Optimizer, self.optimizers(use_pl_optimizer=False))
            sharding.gather_states(optimizer, (p for adapter in self.replicated for p in adapter.factors.values()))
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            steps = sys.maxsize
            if partial := [a.name for a in self.trained if a.span != (0, 1)]:
                raise UsageError(
                    f"{partial[0]} trains for a share of the training: set trainer.max_steps or max_epochs"
                )
        self._steps = int(steps)
        spans = {a.name: list(a.span_in_steps(self._steps)) for a in self.trained if a.span != (0, 1)}
        for name, span in spans.items():
            if (before := self._spans.get(name, span)) != span:
                log.warning(
                    "%s trained in steps %d to %d when the checkpoint was written and does in %d to %d now: the run "
                    "goes on, but is not the one that it would have been", name, *before, *span,
                )  # fmt: skip
        self._spans = spans

    def fuse_kernels(self, ops: Literal["auto"] | Sequence[Operator] = "auto", device: str | None = None) -> None:
        """Put these operators of `lit_kernels`, or all, into the UNet, where `kernels` says so.

        Args:
            device: Type of the device that it trains on; by default the one where it is.

        Raises:
            UsageError: They do not go with this training.
        """
        device = device or self.device.type
        unet = self.built.unet
        lit_kernels.unpatch(unet)
        if self.kernels == "off" or (self.kernels == "auto" and device != "cuda"):
            return
        if self.sharded:
            if self.kernels != "auto":
                raise UsageError(f"kernels: {self.kernels} reads whole weights: with a sharded base use kernels: off")
            log.info("kernels: off, since the base is sharded")
            return
        try:
            made = lit_kernels.patch(unet, ops, backend=cast(lit_kernels.Backend, self.kernels))
        except ValueError as error:
            raise UsageError(f"kernels: {self.kernels}: {error}; kernels: off trains without them") from error
        fused = [*made.layers["bank_lora"], *(f"{n}.to_{p}" for n in made.layers.get("text_kv", ()) for p in "kv")]
        for adapter in self.trained:
            adapter.leave_rounding_to([f"unet.{name}" for name in fused if name not in made.left])
        log.info("kernels: %s", str(made).replace("\n", "; "))

    def on_train_batch_start(self, batch: Mapping[str, Any] | Batch, batch_idx: int) -> None:
        """Tell adapters the optimizer step."""
        for adapter in self.trained:
            adapter.at_step(self.trainer.global_step, self._steps)

    def training_step(self, batch: Mapping[str, Any] | Batch, batch_idx: int) -> Tensor:
        typed = Batch.of(batch)
        self._refresh()
        loss = self.loss(typed, self.draws)
        self.draws += 1
        total = loss.reduce()
        self._figures = {"loss": total.detach(), **loss.terms}
        if penalties := [p for a in self.trained if (p := a.penalty()) is not None]:
            penalty = torch.stack(penalties).sum()
            self._figures["penalty"] = penalty.detach()
            total = total + penalty
        if resting := [p for a in self.trained if not a.learning for p in a.factors.values()]:
            # Ranks wait for a gradient of every parameter, also of those that rest and that no state depends on.
            total = total + 0.0 * torch.stack([p.sum() for p in resting]).sum()
        return total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the gradients of resting adapters away: an optimizer passes over parameters without one."""
        if self.replicated:
            sharding.average_gradients(p for adapter in self.replicated for p in adapter.factors.values())
        for adapter in self.trained:
            if not adapter.learning:
                for parameter in adapter.factors.values():
                    parameter.grad = None

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm over all shares, where there are shares."""
        wrapper: Any = self.trainer.strategy.model
        if not gradient_clip_val or gradient_clip_algorithm not in (None, "norm"):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif self.device_mesh is not None:
            trained = (p for group in optimizer.param_groups for p in group["params"])
            sharding.clip_gradients(trained, gradient_clip_val)
        elif hasattr(wrapper, "clip_grad_norm_"):  # FSDP's, whose norm Lightning does not take
            wrapper.clip_grad_norm_(gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and let the adapters that moved put themselves right before anything looks at them."""
        super().optimizer_step(*args, **kwargs)
        for adapter in self.trained:
            if any(p.grad is not None for p in adapter.factors.values()):
                adapter.after_step()

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
        return {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["litp"] = {
            "draws": self.draws, "base_fingerprint": self.built.fingerprint, "seed": self.seed,
            "options": self.options(), "lr": self._rates, "spans": self._spans, "placed": self.placed,
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
        before, now = state.get("lr", {}), rates_of(self.build_optimizer())
        if before and now and set(before) != set(now):
            raise UsageError(
                f"the run was started with the parameter groups {', '.join(before)}, and now has {', '.join(now)}: "
                "put lr_ratio and block_lr back, or use a new run name"
            )
        for name, rate in now.items():
            if (kept := before.get(name, rate)) != rate:
                log.warning(
                    "the learning rate of %s was %g when the checkpoint was written and is %g now: the run goes on "
                    "with %g, which the optimizer keeps; use a new run name for another", name, kept, rate, kept,
                )  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_resumable(checkpoint)
        state = checkpoint["litp"]
        self.draws = state["draws"]
        self._rates = dict(state.get("lr", {}))
        self._spans = dict(state.get("spans", {}))


def _only_what_trains(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leave the frozen base out of a state dict."""
    for key in [k for k in state if k.startswith(f"{prefix}base.") and k.removeprefix(prefix) not in module.placed]:
        del state[key]
    versions = getattr(state, "_metadata", {})
    for path in [path for path in versions if path == f"{prefix}base" or path.startswith(f"{prefix}base.")]:
        del versions[path]


def rates_of(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Learning rates by the names of the parameter groups; none where the optimizer chooses its own."""
    return {group["name"]: float(group["lr"]) for group in optimizer.param_groups if group["lr"] is not None}
