"""A base and what trains on it, of which every rank holds a share: FSDP2 (Zhao et al., 2023, arXiv 2304.11277).

Transformer blocks and residual blocks are gathered one by one while they run. A change of a whole weight is a parameter
of its layer, gathered and freed with it; so parameters, gradients and optimizer states are all shares. Small factors
(LoRA, tokens) stay whole on every rank, and their gradients are averaged as DDP's are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lit_personalize.adapters.protocol import Adapter
from lit_personalize.backbones.base import Base

UNITS = ("BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer")
"""Classes of modules that are gathered as a whole; all other weights of a component are gathered with it."""


def place(base: Base, adapters: Iterable[Adapter]) -> dict[str, tuple[str, str]]:
    """Make changes of whole weights parameters of their layers.

    Returns:
        Of every factor that moved, by its name in the base now: name of its adapter, and its key there.

    Raises:
        UsageError: An adapter needs weights of the base between steps.
    """
    moved = {id(p): (adapter.name, key) for adapter in adapters for key, p in adapter.place().items()}
    return {name: moved[id(p)] for name, p in base.named_parameters() if id(p) in moved}


def shard(base: Base, mesh: DeviceMesh) -> None:
    """Give every rank of `mesh` its share of the UNet, and of each text encoder whose weights train.

    Args:
        mesh: One dimension; its size is the number of shares.
    """
    for component, module in base.components().items():
        if component == "unet" or any(parameter.requires_grad for parameter in module.parameters()):
            for unit in [m for m in module.modules() if type(m).__name__ in UNITS]:
                fully_shard(unit, mesh=mesh)
            fully_shard(module, mesh=mesh)


def local(tensor: Tensor) -> Tensor:
    """The share of this rank, or the tensor itself where it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the shares that this rank holds."""
    return sum(local(tensor).nbytes for tensor in tensors)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average over all ranks the gradients of parameters that every rank holds whole.

    One that had no part in a rank's loss counts as zero there; one that had none in any keeps no gradient.
    """
    trained = list(parameters)
    pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    present = pieces[0].new_tensor([p.grad is not None for p in trained])
    flat = torch.cat([present, *(piece.reshape(-1) for piece in pieces)])
    dist.all_reduce(flat)
    present, *means = (flat / dist.get_world_size()).split([len(trained), *(p.numel() for p in trained)])
    for parameter, mean, some in zip(trained, means, present.tolist(), strict=True):
        parameter.grad = mean.view_as(parameter) if some else None


def gather_states(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Make whole again the optimizer states that a resume handed out in shares, of parameters that have none.

    Lightning's FSDP reads every tensor of an optimizer as a share.
    """
    for parameter in parameters:
        states = optimizer.state.get(parameter, {})
        for name, value in states.items():
            if isinstance(value, ShardedTensor):
                whole = torch.zeros(value.size(), device=parameter.device)
                for piece in value.local_shards():
                    around = zip(piece.metadata.shard_offsets, piece.metadata.shard_sizes, strict=True)
                    whole[tuple(slice(first, first + size) for first, size in around)] = piece.tensor
                dist.all_reduce(whole)
                states[name] = whole


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Scale the gradients so that their norm over all parameters and shares is at most `largest`; returns it before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    squares = torch.stack([_squares(g for g in gradients if isinstance(g, DTensor) is kind) for kind in (True, False)])
    dist.all_reduce(squares[:1])
    norm = squares.sum().sqrt()
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local(gradient).mul_(factor)
    return norm


def _squares(gradients: Iterator[Tensor]) -> Tensor:
    found = [local(gradient).float().square().sum() for gradient in gradients]
    return torch.stack(found).sum() if found else torch.zeros(())
