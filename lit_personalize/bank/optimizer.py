"""AdamW for every adapter of a bank as if it were alone: rates, clipping, resting groups, steps that are left out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_kernels.bank_adamw import bank_adamw
from lit_personalize.bank.slots import Slot
from lit_personalize.bank.stack import FactorStack, Group


@torch.no_grad()
def update(
    stack: FactorStack, slots: Sequence[Slot], grads: Sequence[Tensor | None], losses_G: Tensor, clips: Sequence[float]
) -> Tensor:
    """One optimizer step of every slot, in place.

    The gradient of one adapter is clipped by its norm over all groups that learn at its present step. A slot whose
    loss or gradient is not finite is left out whole: no weight, moment or count of it changes. Selection is by NaN in
    a row of the gradient, which `bank_adamw` passes over; no slot's numbers meet another's.

    Args:
        grads: Of each group `[G, P]`, changed; None where nothing depended on the group.
        losses_G: Of each slot.
        clips: Largest norm of each slot's gradient; inf for no clipping.

    Returns:
        bool `[G]`: whose step was left out.
    """
    device, dtype = losses_G.device, stack.groups[0].master.dtype
    learning = [learning_now(group, slots, device) for group in stack.groups]
    squares = torch.zeros(len(slots), dtype=dtype, device=device)
    for grad, learns in zip(grads, learning, strict=True):
        if grad is not None:
            squares = squares + torch.where(learns, grad.square().sum(dim=1), 0)
    norm = squares.sqrt()
    skipped = ~(norm.isfinite() & losses_G.isfinite())
    share = (torch.tensor(list(clips), dtype=dtype, device=device) / (norm + 1e-6)).clamp(max=1)
    factor = torch.where(skipped, torch.nan, share)
    rates = torch.tensor([slot.rates.now for slot in slots], dtype=torch.float64, device=device)  # [G, groups, 2]
    betas, eps = _constants_of(slots[0])
    unclipped = torch.full((len(slots),), torch.inf, dtype=dtype, device=device)
    for i, (group, grad, learns) in enumerate(zip(stack.groups, grads, learning, strict=True)):
        if grad is None:
            continue
        grad.mul_(torch.where(learns, factor, torch.nan)[:, None])
        rested = bank_adamw(
            group.master, group.m, group.v, grad, rates[:, i, 0], rates[:, i, 1], group.steps, unclipped, betas, eps
        )  # fmt: skip
        if group.adapter.corrects:
            _put_right(stack, group, ~rested)
    return skipped


def learning_now(group: Group, slots: Sequence[Slot], device: torch.device) -> Tensor:
    """bool `[G]`: in whose present step the group learns, by its adapter's span."""
    found = []
    for slot in slots:
        first, end = group.adapter.span_in_steps(slot.job.steps)
        found.append(first <= slot.step < end)
    return torch.tensor(found, device=device)


def _constants_of(slot: Slot) -> tuple[tuple[float, float], float]:
    """Betas and epsilon, which the recipe says for all."""
    group = slot.rates.optimizer.param_groups[0]
    first, second = group["betas"]
    return (float(first), float(second)), float(group["eps"])


def _put_right(stack: FactorStack, group: Group, moved_G: Tensor) -> None:
    """Let the adapter put its factors right after a step, in the slots that moved."""
    before = group.master.clone()
    with stack.lent():
        group.adapter.after_step()
    group.master.copy_(torch.where(moved_G[:, None], group.master, before))
