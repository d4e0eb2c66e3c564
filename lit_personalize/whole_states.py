"""What every rank of FSDP2 and FSDP holds whole, kept out of the shares of a checkpoint and in its header.

torch's distributed checkpoint writes each tensor as a file of its own inside a file, and names it in its index: some
8 KiB for a trained tensor with its moments and its count of steps. That is nothing to a share of a large weight, and
many times a small factor (LoRA, tokens). Those go into the header that rank 0 writes, as views of one storage, and so
do the counts and the options of the optimizer.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor

from lit_personalize import sharded_state
from lit_personalize.errors import DataError

Tree = dict[str, Any]


def keep_in_header(strategy: FSDPStrategy | ModelParallelStrategy) -> None:
    """Let a strategy write its checkpoints so, and read them; those without whole states in the header, too."""
    strategy.save_checkpoint = partial(_save, strategy)  # type: ignore[method-assign]
    strategy.load_checkpoint = partial(_load, strategy)  # type: ignore[method-assign]


def _save(strategy: Any, checkpoint: Tree, filepath: Any, storage_options: Any | None = None) -> None:
    shares, whole = _split({"state_dict": checkpoint["state_dict"], **_numbered(checkpoint["optimizer_states"])})
    checkpoint["state_dict"] = shares.pop("state_dict", {})
    checkpoint["optimizer_states"] = [shares.get(name, {}) for name in _numbered(checkpoint["optimizer_states"])]
    checkpoint[sharded_state.WHOLE] = _packed(whole)
    type(strategy).save_checkpoint(strategy, checkpoint, filepath, storage_options)


def _load(strategy: Any, checkpoint_path: Any, weights_only: bool | None = None) -> Tree:
    """The header without the whole states, which are put in place with the shares.

    Raises:
        DataError: A state that this training has is neither in the shares nor in the header.
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as states

    path = Path(strategy.broadcast(checkpoint_path))
    header = sharded_state.read_header(path)
    if (whole := header.pop(sharded_state.WHOLE, None)) is None:  # of a release before
        return dict(type(strategy).load_checkpoint(strategy, path, weights_only))
    model, optimizers = strategy.model, strategy.optimizers
    own = _numbered([states.get_optimizer_state_dict(model, optimizer) for optimizer in optimizers])
    for name, about in own.items():  # no state of what has never had a gradient, as the last layer of SDXL's encoders
        about["state"] = {p: state for p, state in about["state"].items() if p in whole[name]["state"]}
    own["state_dict"] = states.get_model_state_dict(model)
    shares, _ = _split(own)
    holders = {"state_dict": "model"} if isinstance(strategy, FSDPStrategy) else {}
    checkpoint.load({holders.get(name, name): part for name, part in shares.items()}, checkpoint_id=path)
    found = _merged(own, shares, whole)
    some = states.StateDictOptions(strict=False)
    states.set_model_state_dict(model, found["state_dict"], options=some)  # all but the frozen base
    for name, optimizer in _numbered(optimizers).items():
        states.set_optimizer_state_dict(model, optimizer, found[name], options=some)
    return header


def _numbered(parts: list[Any]) -> Tree:
    """By the names that Lightning gives optimizers in such a checkpoint."""
    return {f"optimizer_{number}": part for number, part in enumerate(parts)}


def _split(tree: Tree) -> tuple[Tree, Tree]:
    """The tensors that are shares, and all else; no empty branches in the first."""
    shares: Tree = {}
    whole: Tree = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            inner, whole[name] = _split(value)
            if inner:
                shares[name] = inner
        elif isinstance(value, DTensor | ShardedTensor):
            shares[name] = value
        else:
            whole[name] = value
    return shares, whole


def _packed(tree: Tree) -> Tree:
    """The same with tensors on the CPU that are views of one storage for each type, which is then written once."""
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in _tensors(tree):
        kinds.setdefault(tensor.dtype, []).append(tensor)
    views = {
        id(tensor): piece.view(tensor.shape)
        for alike in kinds.values()
        for tensor, piece in zip(
            alike,
            torch.cat([t.detach().reshape(-1).cpu() for t in alike]).split([t.numel() for t in alike]),
            strict=True,
        )
    }

    def replaced(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: replaced(value) for name, value in part.items()}
        return views[id(part)] if isinstance(part, Tensor) else part

    return dict(replaced(tree))


def _tensors(tree: Tree) -> list[Tensor]:
    inner = [_tensors(value) if isinstance(value, dict) else [value] for value in tree.values()]
    return [value for values in inner for value in values if isinstance(value, Tensor)]


def _merged(own: Tree, shares: Tree, whole: Tree, place: str = "") -> Tree:
    """The tree of `own`, with values from either of the others; tensors have storages of their own.

    Raises:
        DataError: Neither has one.
    """
    found: Tree = {}
    for name, value in own.items():
        if isinstance(value, dict):
            found[name] = _merged(value, shares.get(name, {}), whole.get(name, {}), f"{place}{name}.")
        elif name in shares:
            found[name] = shares[name]
        elif name in whole:
            found[name] = whole[name].clone() if isinstance(whole[name], Tensor) else whole[name]
        else:
            raise DataError(f"the checkpoint has no {place}{name}, which this training has: it is of other adapters")
    return found
