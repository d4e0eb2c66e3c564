"""The states that sharding strategies write: directories of shares, read here as whole tensors by one process.

FSDP and FSDP2 write torch's distributed checkpoints, which any number of ranks can read. DeepSpeed writes a file for
each of its ranks, and only as many can go on from it.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lit_personalize.errors import DataError

HEADER = "meta.pt"
"""Lightning's name for what is no tensor of the model or the optimizer."""
INDEX = ".metadata"
WHOLE = "whole"
"""Key of a header under which stands what every rank holds whole: see `whole_states`."""
DEEPSPEED_TAG = "checkpoint"
"""Lightning's name of the one state in a DeepSpeed directory."""
DEEPSPEED_MODEL = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
_CHECKPOINT = "torch.distributed.checkpoint"
_NEEDED = {
    *((f"{_CHECKPOINT}.metadata", name) for name in (
        "Metadata", "TensorProperties", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"), ("torch", "Size"), ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"), ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"),
    *(("torch", name) for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "bool", "uint8")),
}  # fmt: skip
"""What the pickle of an index names."""


def kind(path: Path) -> str:
    """Which strategy's state stands at `path`: "whole" for one file, else "distributed" or "deepspeed".

    Raises:
        DataError: None that this release knows.
    """
    if path.is_file():
        return "whole"
    if (path / INDEX).is_file():
        return "distributed"
    if (path / DEEPSPEED_TAG).is_dir():
        return "deepspeed"
    raise DataError(f"{path} is no state of a training: neither a file nor shares of one")


def read_header(path: Path) -> dict[str, Any]:
    """All but the tensors of the model and the optimizer."""
    if kind(path) == "deepspeed":
        return _deepspeed_header(path)
    return dict(torch.load(path / HEADER, map_location="cpu", weights_only=True))


def read_state(path: Path, device: str = "cpu") -> dict[str, Any]:
    """The header, and the trained tensors whole and by the names of an unsharded training as `state_dict`.

    Args:
        device: "meta" gives names, types and shapes alone.
    """
    header = read_header(path)
    elsewhere = header["litp"]["placed"]
    whole = {name: tensor.to(device) for name, tensor in header.pop(WHOLE, {}).get("state_dict", {}).items()}
    found = (_deepspeed_tensors if kind(path) == "deepspeed" else _distributed_tensors)(path, device)
    if not (found := {**found, **whole}):
        raise DataError(f"{path} holds no tensors of a model")
    return {**header, "state_dict": {elsewhere.get(name, name): tensor for name, tensor in found.items()}}


def _distributed_tensors(path: Path, device: str) -> dict[str, Tensor]:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    index = read_index(path / INDEX).state_dict_metadata
    # FSDP2 writes the first, FSDP the second; neither where every rank holds all of it.
    holder = next((h for h in ("state_dict", "model") if any(n.startswith(f"{h}.") for n in index)), "state_dict")
    wanted = {
        name.removeprefix(f"{holder}."): torch.empty(about.size, dtype=about.properties.dtype, device=device)
        for name, about in index.items()
        if name.startswith(f"{holder}.") and isinstance(about, TensorStorageMetadata)
    }
    if wanted and device != "meta":
        checkpoint.load({holder: wanted}, checkpoint_id=path, no_dist=True)
    return wanted


def read_index(path: Path) -> Any:
    """The index of a distributed checkpoint, which torch keeps as a pickle: only what such an index needs is loaded.

    Raises:
        DataError: It asks for anything else.
    """
    with path.open("rb") as file:
        return _IndexUnpickler(file, path).load()


class _IndexUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], path: Path):
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NEEDED:
            return super().find_class(module, name)
        raise DataError(f"{self.path} asks for {module}.{name}, which no index needs: it is not a checkpoint's own")


def _deepspeed_header(path: Path) -> dict[str, Any]:
    """Of the first rank: its file holds the whole module before stage 3, and only names and shapes from there on."""
    folder = path / DEEPSPEED_TAG
    found = [file for name in DEEPSPEED_MODEL for file in [folder / name] if file.is_file()]
    if not found:
        raise DataError(f"{folder} has no model states of DeepSpeed")
    return dict(torch.load(found[0], map_location="cpu", weights_only=True))


def _deepspeed_tensors(path: Path, device: str) -> Mapping[str, Tensor]:
    header = _deepspeed_header(path)
    shapes = {name: shape for group in header["param_shapes"] for name, shape in group.items()}
    if device == "meta":
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    if header["ds_config"]["zero_optimization"]["stage"] < 3:
        return {name: header["module"][name].float() for name in shapes}
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(sys.stderr):  # it prints what it does
        return dict(get_fp32_state_dict_from_zero_checkpoint(path, DEEPSPEED_TAG, exclude_frozen_parameters=True))
