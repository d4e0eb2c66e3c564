"""The one typed batch that objectives see, whatever stream, cache or bank it came from.

Data modules deliver a mapping with these field names (they know nothing of this class);
`Batch.of` checks it once, at the boundary. Shapes: `B` samples, `S` text tokens, `E` text width,
`P` pooled width, latents `[B, C, h, w]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor


class Role(IntEnum):
    """Why a sample is in the batch."""

    INSTANCE = 0
    PRIOR = 1
    REPLAY = 2


@dataclass
class Batch:
    """One step's samples: pixels of the first, VAE posteriors of the others (or all of one kind); ids or states."""

    role: Tensor
    """int64 `[B]`, values of `Role`."""
    position: Tensor
    """int64 `[B]`: index of the sample within its adapter's step, over all ranks; keys random draws."""
    sample_id: list[str]
    """`[B]` names for messages and the manifest."""
    pixels: Tensor | None = None
    """fp32 `[B', 3, H, W]` in [-1, 1], of the first B' samples."""
    latent_mean: Tensor | None = None
    """fp32 `[B - B', C, h, w]` of the samples behind them: mean of the VAE posterior, not yet scaled."""
    latent_std: Tensor | None = None
    """fp32 `[B - B', C, h, w]`: standard deviation of the VAE posterior, exp(log-variance / 2).

    A step multiplies by it, so a batch has it ready; in half-precision files only the log-variance keeps its
    precision, small deviations underflow.
    """
    input_ids: tuple[Tensor, ...] | None = None
    """One int64 `[B, S]` per tokenizer."""
    text_states: Tensor | None = None
    """`[B, S, E]`: cached states, when nothing of the text side trains."""
    pooled: Tensor | None = None
    """`[B, P]`: cached pooled states (SDXL)."""
    mask: Tensor | None = None
    """fp32 `[B, 1, h, w]`: latent cells that count in the loss."""
    time_ids: Tensor | None = None
    """fp32 `[B, 6]`: SDXL's original size, crop corner and target size."""
    concept: Tensor | None = None
    """int64 `[B]`: index of the concept."""
    slot: Tensor | None = None
    """int64 `[B]`: place of the adapter in a bank; the samples of a slot lie side by side, all slots have as many."""
    seed: Tensor | None = None
    """int64 `[B]`, on the CPU: of each sample's random draws, where adapters of a bank have their own."""
    step: Tensor | None = None
    """int64 `[B]`, on the CPU: of each sample's adapter, which keys its random draws; likewise."""
    captions: list[str] | None = None

    def __post_init__(self) -> None:
        if self.pixels is None and self.latent_mean is None:
            raise ValueError("a Batch has pixels, or latent_mean (with latent_std), or pixels of the first samples")
        if (self.latent_mean is None) != (self.latent_std is None):
            raise ValueError("latent_mean and latent_std come together")
        if (self.input_ids is None) == (self.text_states is None):
            raise ValueError("a Batch has either input_ids or text_states")
        size = len(self)
        drawn = 0 if self.pixels is None else len(self.pixels)
        behind = {"pixels": drawn, "latent_mean": size - drawn, "latent_std": size - drawn}
        if self.latent_mean is None:
            behind["pixels"] = size
        for name, value in vars(self).items():
            parts = value if name == "input_ids" and value is not None else (value,)
            for part in parts:
                if part is not None and len(part) != behind.get(name, size):
                    raise ValueError(f"Batch.{name} has {len(part)} samples, not {behind.get(name, size)}, of {size}")

    def __len__(self) -> int:
        return len(self.role)

    @classmethod
    def of(cls, mapping: Mapping[str, Any] | Batch) -> Batch:
        """Build a batch from a data module's mapping; unknown or missing fields raise ValueError."""
        if isinstance(mapping, Batch):
            return mapping
        known = {f.name for f in fields(cls)}
        if unknown := set(mapping) - known:
            raise ValueError(f"unknown batch fields {sorted(unknown)}; known: {sorted(known)}")
        if missing := {"role", "position", "sample_id"} - set(mapping):
            raise ValueError(f"missing batch fields {sorted(missing)}")
        values = dict(mapping)
        if values.get("input_ids") is not None:
            values["input_ids"] = tuple(values["input_ids"])
        return cls(**values)

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        if self.device == device:
            return self

        def moved(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(moved(part) for part in value)
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        return Batch(**{n: value if n in ("seed", "step") else moved(value) for n, value in vars(self).items()})

    @property
    def device(self) -> torch.device:
        return self.role.device

    def where(self, role: Role) -> Tensor:
        """bool `[B]`: samples of one role."""
        return self.role == int(role)

    def count_in_slot(self, members: Tensor) -> Tensor:
        """How many of the `members`, bool `[B]`, each sample's slot has, or without slots all have: int64 `[B]`."""
        if self.slot is None:
            return members.sum().expand(len(self))
        counts = torch.zeros(len(self), dtype=torch.int64, device=self.device)
        return counts.index_add_(0, self.slot, members.to(torch.int64))[self.slot]
