"""Bytes of one training step, counted without weights, pictures or a GPU.

The objective's own training step, backward pass and optimizer step run on fake tensors: shapes and types without
values. Every storage that an operator makes is counted as long as it lives. What kernels take for themselves inside
an operator (workspaces of cuDNN) is not seen, nor what an allocator rounds up or a GPU's context takes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.batch import Batch, Role
from lit_personalize.objectives.denoising import Denoising


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make inside, as long as they live: fake ones and real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage(), given)
        return result

    def _note(self, storage: Any, given: set[int]) -> None:
        """Count a storage once; one of the operator's inputs was there before."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in given:
            return

        def forget(_: Any) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)

    def restart(self) -> int:
        """Let the peak begin at what lives now, which it returns."""
        self.peak = self.now
        return self.now


@dataclass
class View:
    """What a step shows the model, as far as it decides about memory."""

    instances: int
    priors: int
    shape: tuple[int, int]
    """Height and width of the pictures in pixels."""
    captions: list[str]
    pixels: int
    """Samples of the batch that come as pixels, which the VAE encodes within the step; others have kept latents."""


@dataclass
class StepMemory:
    """Bytes of one training step on one device that holds everything."""

    base: dict[str, int] = field(default_factory=dict)
    """Frozen parameters and buffers by component."""
    trained: int = 0
    formed: int = 0
    """Weights that adapters put together for a step: W0 + Δ, and casts of factors."""
    optimizer: int | None = 0
    """State of the optimizer; None where it could not be counted. Gradients take as much as what trains."""
    saved: int = 0
    """What the forward pass leaves for the backward pass."""
    forward: int = 0
    """Most bytes alive in the forward pass, beyond what lives between steps; with gradients unless these are shared."""
    backward: int = 0
    """Likewise in the backward pass."""
    update: int = 0
    """Likewise in the optimizer's step, always without gradients."""
    encoding: int = 0
    """Likewise while the VAE encodes the batch's pictures."""
    note: str = ""


def fake_objective(objective: Denoising) -> FakeTensorMode:
    """Give an objective that is not built yet a base of fake tensors, from configs alone, and its adapters.

    Raises:
        DataError: The base's configs are missing or damaged.
        UsageError: What `configure_model` refuses.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    base = load_base(objective.base_name, **objective.base_options, weights=False)
    with mode, torch.random.fork_rng(devices=[]):
        _become_fake(base)
        objective.attach_to(base)
    return mode


def _become_fake(base: Base) -> None:
    for module in base.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                fake = torch.empty(weight.shape, dtype=weight.dtype)
                module._parameters[name] = nn.Parameter(fake, weight.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype)


def fake_batch(objective: Denoising, mode: FakeTensorMode, view: View) -> Batch:
    """A batch of kept latents without values; ids and roles are real."""
    base = objective.built
    count = view.instances + view.priors
    side = [length // base.downscale for length in view.shape]
    with mode:
        mean, std = (torch.empty(count, base.latent_channels, *side) for _ in range(2))
    captions = (view.captions * count)[:count]
    return Batch(
        role=torch.tensor([int(Role.INSTANCE)] * view.instances + [int(Role.PRIOR)] * view.priors),
        position=torch.arange(count), sample_id=[str(i) for i in range(count)], latent_mean=mean, latent_std=std,
        input_ids=base.tokenize(captions), time_ids=torch.zeros(count, 6) if base.needs_time_ids else None,
        concept=torch.arange(count) % 2, captions=captions,
    )  # fmt: skip


def count_step(
    objective: Denoising, mode: FakeTensorMode, view: View, *, accumulates: bool = False, shared: bool = False,
    foreach: bool = False,
) -> StepMemory:  # fmt: skip
    """Run one training step of an objective with a base of fake tensors.

    As Lightning does it, gradients of the step before are there in the forward pass, and gone before the backward pass.

    Args:
        accumulates: Gradients of a batch before stay for the backward pass.
        shared: Ranks share gradients out: each is freed when it is whole, and none is counted.
        foreach: The optimizer steps all tensors at once, as torch's do on a GPU.
    """
    base, found = objective.built, StepMemory()
    for name, component in base.components().items():
        held = [*component.parameters(), *component.buffers()]
        found.base[name] = sum(t.nbytes for t in held if not t.requires_grad)
    factors = [p for adapter in objective.trained for p in adapter.factors.values()]
    found.trained = sum(p.nbytes for p in factors)
    found.formed = _formed_bytes(base)
    batch = fake_batch(objective, mode, view)
    live = LiveBytes()
    with live:
        if not objective.trains_text:
            objective.conditioning(batch, 0)  # whose states are kept
        found.encoding = _encoding_bytes(base, mode, view, live)
        _count_optimizer(objective, factors, foreach, found, live)
        for adapter in objective.trained:  # formed under watch, since the step replaces them
            adapter.refresh(base.dtype)
        start = live.restart()
        if not shared:
            _set_gradients(factors)
        before = live.now
        loss = objective.training_step(batch, 0)
        found.saved, found.forward = live.now - before, live.peak - start
        if not accumulates:
            _drop_gradients(factors)
        live.restart()
        handles = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in factors if shared]
        loss.backward()
        found.backward = live.peak - start
        for handle in handles:
            handle.remove()
        _drop_gradients(factors)
    return found


def _set_gradients(factors: Iterable[nn.Parameter]) -> None:
    for p in factors:
        p.grad = torch.zeros_like(p)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _drop_gradients(factors: Iterable[nn.Parameter]) -> None:
    for p in factors:
        _drop_gradient(p)


def _formed_bytes(base: Base) -> int:
    """Of tensors that stand in for parameters in their modules."""
    own = {p.untyped_storage()._cdata for a in base.adapters for p in a.factors.values()}
    own |= {p.untyped_storage()._cdata for p in base.parameters()}
    found = {}
    for module in base.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in own:
                found[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
    return sum(found.values())


def _encoding_bytes(base: Base, mode: FakeTensorMode, view: View, live: LiveBytes) -> int:
    if not view.pixels:
        return 0
    with mode:
        pixels = torch.empty(view.pixels, 3, *view.shape, dtype=base.vae.dtype)
    before = live.restart()
    with torch.no_grad():
        base.vae.encode(pixels)
    return live.peak - before


def _count_optimizer(
    objective: Denoising, factors: list[nn.Parameter], foreach: bool, found: StepMemory, live: LiveBytes
) -> None:
    """Step the configured optimizer once with gradients of zeros; a second step has all of its state."""
    try:
        optimizer = objective.build_optimizer()
        for group in optimizer.param_groups:
            if foreach and "foreach" in group and group["foreach"] is None and not group.get("fused"):
                group["foreach"] = True
        _set_gradients(factors)
        optimizer.step()
        found.optimizer = state_bytes(optimizer)
        before = live.restart()
        optimizer.step()
        found.update = live.peak - before
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, AssertionError) as error:
        name = getattr(objective.optimizer_factory, "__name__", "the optimizer")
        found.optimizer, found.note = None, f"{name} does not step without values: {str(error).splitlines()[0]}"
    finally:
        _drop_gradients(factors)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in an optimizer's state."""
    values = (v for state in optimizer.state.values() for v in tree_leaves(state))
    return sum(v.nbytes for v in values if isinstance(v, Tensor))
