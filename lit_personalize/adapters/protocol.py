"""What every adapter is: named fp32 factors that change some layers or tokens of a base.

An adapter knows no loss and no data. Objectives, regularizers, banks and merges reach it only
through this protocol. Legend: `W0 [out, in]`, `A [R, in]` (down), `B [out, R]` (up), ΔW = s·B·A.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_personalize.backbones.base import Base
from lit_personalize.errors import UsageError


@dataclass
class LowRank:
    """One layer's ΔW = (alpha / rank) · up · down, on the CPU in fp32."""

    down: Tensor
    """`[R, in]`; of a convolution `[R, in, height, width]`."""
    up: Tensor
    """`[out, R]`; of a convolution `[out, R, 1, 1]`."""
    alpha: float

    @property
    def rank(self) -> int:
        """R, the rows of `down`."""
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """ΔW as a matrix `[out, in]`; of a convolution `[out, in * height * width]`."""
        return (self.alpha / self.rank) * (self.up.flatten(1) @ self.down.flatten(1))

    def shaped(self, shape: Sequence[int]) -> LowRank:
        """The factors as those of a weight `[out, in]` or `[out, in, height, width]` of this shape."""
        down = self.down.reshape(-1, *shape[1:])
        return LowRank(down, self.up.reshape(shape[0], -1, *[1] * (len(shape) - 2)), self.alpha)

    def concatenate(self, other: LowRank) -> LowRank:
        """The exact sum of two changes: ranks stand side by side, scales are multiplied into `up`."""
        ups = [f.up * (f.alpha / f.rank) for f in (self, other)]
        rank = self.rank + other.rank
        return LowRank(torch.cat([self.down, other.down]), torch.cat(ups, dim=1), float(rank))


@dataclass
class Dora:
    """One layer whose outputs are rescaled (DoRA, Liu et al., 2024, eq. 5), on the CPU in fp32."""

    factors: LowRank
    magnitude: Tensor
    """m `[out]`."""

    def delta(self, weight: Tensor) -> Tensor:
        """ΔW `[out, in]` on W0 `[out, in]`: m·(W0 + s·B·A) / ‖W0 + s·B·A‖ - W0, the norm without a gradient."""
        change = self.factors.delta()
        norm = (weight + change).norm(dim=1).detach()
        surplus = ((self.magnitude - norm) / norm)[:, None]
        return surplus * weight + (1 + surplus) * change


@dataclass
class AdapterWeights:
    """What an adapter hands to exporters. Layer names begin with their component: `unet.`, `text_encoder.`."""

    low_rank: dict[str, LowRank] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    """ΔW `[out, in]` of layers without low-rank structure."""
    parameters: dict[str, Tensor] = field(default_factory=dict)
    """Changes of biases, norms and embeddings in their own shapes, by full name (`unet.conv_in.bias`)."""
    rotations: dict[str, Tensor] = field(default_factory=dict)
    """Of layers in `dense`, the same change as OFT's blocks `[r, b(b-1)/2]`, for clients that rotate."""
    neurons: dict[str, Tensor] = field(default_factory=dict)
    """Of layers in `dense`, the same change as sorted flat int32 indices of weights that are zero."""
    values: dict[str, Tensor] = field(default_factory=dict)
    """Of layers in `neurons`, what these weights are instead of zero, `[n]` in the order of the indices."""
    tokens: dict[str, list[Tensor]] = field(default_factory=dict)
    """Token name -> one `[n, d]` per text encoder."""
    dora: dict[str, Dora] = field(default_factory=dict)
    """What some of the dense changes are made of, for the format that can say it."""

    def layers(self) -> list[str]:
        """Every changed layer."""
        return list(dict.fromkeys([*self.low_rank, *self.dense]))

    def delta(self, layer: str) -> Tensor:
        """ΔW `[out, in]` of one layer; its low-rank and dense changes add up."""
        if layer not in self.low_rank:
            return self.dense[layer]
        low_rank = self.low_rank[layer].delta()
        return low_rank + self.dense[layer] if layer in self.dense else low_rank

    def deltas(self) -> dict[str, Tensor]:
        """ΔW of every changed layer at once; together they are as large as the weights they change."""
        return {layer: self.delta(layer) for layer in self.layers()}

    def merge(self, other: AdapterWeights) -> AdapterWeights:
        """Both sets together; neurons without values unite.

        Raises:
            UsageError: Another layer, or a token, is in both.
        """
        merged = AdapterWeights()
        united = (set(self.neurons) & set(other.neurons)) - set(self.values) - set(other.values)
        for kind in (f.name for f in fields(self)):
            own, others = getattr(self, kind), getattr(other, kind)
            if both := (set(own) & set(others)) - (united if kind in ("dense", "neurons") else set()):
                named = ", ".join(sorted(both)[:3])
                raise UsageError(f"two adapters change {named}: name one of their files, or merge them (litp merge)")
            setattr(merged, kind, {**own, **others})
        for layer in united:
            one, two = self.dense[layer], other.dense[layer]
            merged.dense[layer] = torch.where(one != 0, one, two)
            merged.neurons[layer] = torch.cat([self.neurons[layer], other.neurons[layer]]).unique()
        return merged


class Adapter(nn.Module, ABC):
    """Base class. Construct with options only; `attach` builds the parameters on a base.

    Args:
        name: Distinguishes adapters on one base.
        lr: Learning rate of this adapter's parameter group; None takes the objective's.
        weight_decay: Likewise.
        span: From where to where in the training the factors move: shares of it, or, above 1, optimizer steps.
            Before and after, nothing moves them: no gradient, no moment of the optimizer, no weight decay.
    """

    cannot_export: ClassVar[Mapping[str, str]] = {}
    """Export formats that would lose what this adapter learns: format -> why, and what to take instead."""

    def __init__(
        self, name: str, lr: float | None = None, weight_decay: float | None = None, span: tuple[float, float] = (0, 1)
    ):
        super().__init__()
        if not 0 <= span[0] < span[1]:
            raise UsageError(f"{name}: span {list(span)} is empty; it goes from one share of the training to a later")
        self.name = name
        self.lr = lr
        self.weight_decay = weight_decay
        self.span = span
        self.learning = True
        """Whether the present step lies in the span."""
        self.active = True
        self.steady = True
        """Whether the factors stay the same tensors from step to step; where ranks hold shares, they do not."""
        self.attached = False
        self.factors = nn.ParameterDict()

    @abstractmethod
    def attach(self, base: Base, seed: int = 0) -> None:
        """Create fp32 factors and hook them into `base`; a second call does nothing."""

    @abstractmethod
    def delta(self, layer: str) -> Tensor:
        """ΔW `[out, in]` of one layer in fp32, with a gradient to the factors."""

    @abstractmethod
    def layers(self) -> list[str]:
        """Changed layers as `<component>.<module path>`, in the base's module order."""

    @abstractmethod
    def export_weights(self) -> AdapterWeights:
        """Detached fp32 CPU copies in client-independent form."""

    def span_in_steps(self, steps: int) -> tuple[int, int]:
        """First optimizer step of the span and the one behind its last, in a training of `steps`."""
        first, end = (int(x if x > 1 else x * steps + 1e-9) for x in self.span)  # 0.29 * 100 is 28.999...
        return first, end

    def why_not_in_a_bank(self) -> str:
        """Why a bank cannot train this adapter, which is attached; "" if it can, and has the two methods below."""
        return "a bank trains LoRA and TokenEmbedding"

    def begin(self, seed: int, class_noun: str = "") -> None:
        """Put factors and buffers where a new adapter of this seed, for a concept of this noun, begins (banks)."""
        raise NotImplementedError(self.why_not_in_a_bank())

    def lend(self, stacked: Mapping[str, Tensor] | None) -> None:
        """Compute with the factors and buffers of G adapters, by name, each `[G, ...]`; None goes back to the own ones.

        Of a batch, the first of G equal shares meets the first adapter, and so on (banks).
        """
        raise NotImplementedError(self.why_not_in_a_bank())

    def at_step(self, step: int, steps: int) -> None:
        """Take up what holds at optimizer step `step` of `steps`; called before every batch."""
        first, end = self.span_in_steps(steps)
        self.learning = first <= step < end

    def after_step(self) -> None:
        """Put the factors right after an optimizer step that moved them."""

    def penalty(self) -> Tensor | None:
        """A scalar that training adds to its loss, or None."""
        return None

    @property
    def shares_layers(self) -> bool:
        """Whether other adapters may change the same layers; their ΔW add up."""
        return True

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for an optimizer, each with a stable name and the options that it has of its own.

        A group may say `lr_ratio`, by which its learning rate is multiplied, whoever sets that.
        """
        return [self._group(self.name, list(self.factors.values()))]

    def _group(self, name: str, parameters: list[nn.Parameter], **options: float | None) -> dict[str, Any]:
        own = {"lr": self.lr, "weight_decay": self.weight_decay, **options}
        return {"name": name, "params": parameters, **{k: v for k, v in own.items() if v is not None}}

    def refresh(self, dtype: torch.dtype) -> None:
        """Cast the weights once for the coming step; the factors themselves stay fp32."""

    @property
    def elementwise(self) -> bool:
        """Whether a share of a factor can be trained by itself: between steps nothing but the optimizer reads it."""
        return False

    @property
    def corrects(self) -> bool:
        """Whether `after_step` changes factors."""
        return False

    def place(self) -> dict[str, nn.Parameter]:
        """Prepare for a base whose weights are whole only while they are used (`lit_personalize.sharding`).

        Returns:
            Factors that are parameters of the base's layers from now on, by their keys in `factors`.

        Raises:
            UsageError: This adapter reads weights of the base between steps.
        """
        raise UsageError(f"{self.name}: {type(self).__name__} needs whole weights of the base; train it with DDP")

    def leave_rounding_to(self, fused: Collection[str]) -> None:
        """Hear which layers now run kernels that read fp32 factors; most adapters hand out whole weights."""

    def at(self, progress: float, timestep: float = 0.0) -> None:
        """Hear from a sampler, before each prediction, which share of the denoising is done; most do not care.

        Args:
            timestep: Of the noise schedule, at which the base is asked.
        """

    def set_active(self, active: bool) -> None:
        """Switch the adapter on or off without touching its factors."""
        self.active = active

    def named_factors(self) -> dict[str, nn.Parameter]:
        """Trained parameters by stable names (`<layer>:A`; dots are kept)."""
        return {_unescape(key): parameter for key, parameter in self.factors.items()}

    def add_factor(self, name: str, value: Tensor) -> nn.Parameter:
        """Register a trained fp32 parameter under a stable name."""
        parameter = nn.Parameter(value.detach().clone().float())
        self.factors[_escape(name)] = parameter
        return parameter

    def factor(self, name: str) -> nn.Parameter:
        """One trained parameter by its stable name."""
        return self.factors[_escape(name)]

    def constants(self) -> dict[str, Tensor]:
        """What an adapter was begun with and does not train, by name."""
        return dict(self.named_buffers())

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of all factors."""
        return {name: p.detach().clone() for name, p in self.named_factors().items()}

    @torch.no_grad()
    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Put back a snapshot of exactly these factors.

        Raises:
            ValueError: Names or shapes differ.
        """
        own = self.named_factors()
        if set(own) != set(snapshot):
            missing, unknown = sorted(set(own) - set(snapshot)), sorted(set(snapshot) - set(own))
            raise ValueError(f"adapter {self.name!r}: missing factors {missing[:3]}, unknown factors {unknown[:3]}")
        for name, value in snapshot.items():
            if own[name].shape != value.shape:
                raise ValueError(f"adapter {self.name!r}: {name} is {tuple(own[name].shape)}, not {tuple(value.shape)}")
            own[name].copy_(value)

    @property
    def trains_text(self) -> bool:
        """Whether gradients must flow through a text encoder."""
        return any(layer.startswith("text_encoder") for layer in self.layers())


def stack(snapshots: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack the factors of G adapters of one shape: name -> `[G, ...]`."""
    return {name: torch.stack([s[name] for s in snapshots]) for name in snapshots[0]}


def unstack(stacked: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The inverse of `stack`."""
    count = len(next(iter(stacked.values())))
    return [{name: value[g] for name, value in stacked.items()} for g in range(count)]


def _escape(name: str) -> str:
    return name.replace(".", "|")


def _unescape(key: str) -> str:
    return key.replace("|", ".")
