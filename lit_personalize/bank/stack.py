"""The factors of all adapters of a bank: per parameter group one `[G, P]` tensor, and as many for the moments.

The objective's adapters stand for one adapter of the bank: they say which layers and tokens train, and where a new
adapter begins; the values that train are here. Legend: `G` adapters, `P` parameters of one group of one adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lit_personalize.adapters.protocol import Adapter, AdapterWeights
from lit_personalize.errors import DataError

KINDS = ("master", "m", "v", "steps")


@dataclass
class Group:
    """One parameter group, such as the factors of a LoRA; as the optimizer wants them."""

    options: dict[str, Any]
    """As `Adapter.parameter_groups` gives them, without the parameters."""
    adapter: Adapter
    shapes: dict[str, torch.Size]
    """By factor, in the order of the columns."""
    master: Tensor
    """Weights `[G, P]`, fp32; fp64 of a base in fp64."""
    m: Tensor
    v: Tensor
    steps: Tensor
    """int64 `[G]`: AdamW's own count, without skipped steps."""

    @property
    def name(self) -> str:
        return str(self.options["name"])

    def views(self) -> dict[str, Tensor]:
        """Every factor `[G, ...]`, with a gradient to `master`."""
        parts = self.master.split([shape.numel() for shape in self.shapes.values()], dim=1)
        return {n: p.unflatten(1, shape) for (n, shape), p in zip(self.shapes.items(), parts, strict=True)}


@dataclass
class FactorStack:
    """Groups and constants of all adapters, one row a slot; rows are added at the end."""

    adapters: Sequence[Adapter]
    groups: list[Group] = field(default_factory=list)
    constants: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """By adapter and name, `[G, ...]`: what an adapter began with and does not train."""

    @classmethod
    def of(cls, adapters: Sequence[Adapter], dtype: torch.dtype) -> FactorStack:
        """An empty stack for adapters that are attached."""
        stack = cls(adapters)
        for adapter in adapters:
            names = {id(parameter): name for name, parameter in adapter.named_factors().items()}
            for group in adapter.parameter_groups():
                shapes = {names[id(p)]: p.shape for p in group["params"]}
                width = sum(shape.numel() for shape in shapes.values())
                device = group["params"][0].device
                master, m, v = (torch.zeros(0, width, dtype=dtype, device=device) for _ in range(3))
                options = {key: value for key, value in group.items() if key != "params"}
                steps = torch.zeros(0, dtype=torch.int64, device=device)
                stack.groups.append(Group(options, adapter, shapes, master, m, v, steps))
            constants = adapter.constants()
            stack.constants[adapter.name] = {n: c.new_zeros(0, *c.shape, dtype=dtype) for n, c in constants.items()}
        return stack

    def __len__(self) -> int:
        return len(self.groups[0].steps)

    @property
    def options(self) -> list[dict[str, Any]]:
        """Of all groups."""
        return [group.options for group in self.groups]

    @property
    def parameters(self) -> int:
        """Of one adapter."""
        return sum(group.master.shape[1] for group in self.groups)

    # ---- rows -------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, slot: int, seed: int, class_noun: str) -> None:
        """Put a new adapter into a slot, or behind the last one."""
        if slot == len(self):
            self._each(lambda tensor: torch.cat([tensor, tensor.new_zeros(1, *tensor.shape[1:])]))
        for adapter in self.adapters:
            adapter.begin(seed, class_noun)
            for name, constant in adapter.constants().items():
                self.constants[adapter.name][name][slot] = constant
        for group in self.groups:
            factors = group.adapter.named_factors()
            group.master[slot] = torch.cat([factors[name].detach().flatten() for name in group.shapes])
            for tensor in (group.m, group.v, group.steps):
                tensor[slot] = 0

    @torch.no_grad()
    def keep(self, slots: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        self._each(lambda tensor: tensor[list(slots)].clone())

    def _each(self, change: Any) -> None:
        for group in self.groups:
            for kind in KINDS:
                setattr(group, kind, change(getattr(group, kind)))
        for constants in self.constants.values():
            constants.update({name: change(tensor) for name, tensor in constants.items()})

    @torch.no_grad()
    def weights(self, slot: int) -> AdapterWeights:
        """What the adapter in a slot exports."""
        found = AdapterWeights()
        for adapter in self.adapters:
            own = {n: v[slot] for group in self.groups if group.adapter is adapter for n, v in group.views().items()}
            before = adapter.snapshot()
            adapter.restore(own)
            found = found.merge(adapter.export_weights())
            adapter.restore(before)
        return found

    # ---- use --------------------------------------------------------------------------------------

    @contextmanager
    def lent(self) -> Iterator[list[Tensor]]:
        """Inside, the objective's adapters compute with the rows of this stack; gives the tensors to differentiate."""
        for group in self.groups:
            group.master.requires_grad_(torch.is_grad_enabled())
        try:
            for adapter in self.adapters:
                factors = [group.views() for group in self.groups if group.adapter is adapter]
                adapter.lend({n: v for views in factors for n, v in views.items()} | self.constants[adapter.name])
            yield [group.master for group in self.groups]
        finally:
            for adapter in self.adapters:
                adapter.lend(None)
            for group in self.groups:
                group.master.requires_grad_(False)

    # ---- checkpoints ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        groups = {group.name: {kind: getattr(group, kind) for kind in KINDS} for group in self.groups}
        return {"groups": groups, "constants": self.constants}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up all rows.

        Raises:
            DataError: They are of other adapters.
        """
        if set(state["groups"]) != {group.name for group in self.groups}:
            raise DataError(f"the bank's checkpoint is of other adapters: {', '.join(state['groups'])}")
        for group in self.groups:
            for kind in KINDS:
                found, own = state["groups"][group.name][kind], getattr(group, kind)
                if found.shape[1:] != own.shape[1:] or found.dtype != own.dtype:
                    raise DataError(
                        f"the bank's checkpoint has {list(found.shape[1:])} {found.dtype} for {group.name}, this "
                        f"recipe has {list(own.shape[1:])} {own.dtype}: use the same recipe or another folder"
                    )
                setattr(group, kind, found.to(own.device, copy=True))
        for adapter, constants in self.constants.items():
            for name, own in constants.items():
                constants[name] = state["constants"][adapter][name].to(own.device, copy=True)
