"""A bank between two steps, on disk: whole or not there, and checked before it is read (see `checkpoints`)."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from lit_personalize import checkpoints
from lit_personalize.bank.engine import Bank

log = logging.getLogger(__name__)


def save(bank: Bank, folder: Path, keep_last: int = 2) -> None:
    """Publish the state of a bank that is between two steps, unless that of this step is there.

    Raises:
        PublishError: The disk is full or failed; earlier ones are untouched.
    """
    state = bank.state_dict()
    found = checkpoints.find_complete(folder)
    if found is not None and found.step == bank.steps:
        return
    needed = sum(t.nbytes for group in state["stack"]["groups"].values() for t in group.values())
    checkpoints.publish(
        folder, bank.steps, lambda place: torch.save(state, place / checkpoints.STATE), needed_bytes=needed
    )
    checkpoints.prune(folder, keep_last)


def restore(bank: Bank, folder: Path) -> list[str]:
    """Take up the newest whole state in a folder.

    Returns:
        Ids of the adapters that were in training, which the next `run` must be given; empty if there is no state.

    Raises:
        DataError: The state is of another base, recipe or initial seed.
    """
    found = checkpoints.find_complete(folder)
    if found is None:
        return []
    for reason in found.skipped:
        log.warning("passed over a checkpoint of the bank: %s", reason)
    bank.load_state_dict(checkpoints.read_state(found.path))
    return bank.awaited
