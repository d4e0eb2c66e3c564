"""The files that hold a corpus's rows: safetensors with one tensor `rows [n, D]`, never changed once written.

As fp16 every factor (slice) has one scale per shard, a power of two in the tensor `scales`, by which its numbers are
brought to the upper end of fp16's range: B's small values would else fall below its normal numbers (6e-5).
Value = rows · scale of the column's slice.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from lit_personalize import atomic
from lit_personalize.errors import DataError
from lit_personalize.tensor_files import read_header

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
TOP = 15
"""Scaled fp16 numbers of a slice end below 2^15."""


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def encode(rows: Tensor, sizes: Sequence[int], dtype: str) -> dict[str, Tensor]:
    """fp32 rows `[n, D]`, of slices of these sizes, as the tensors of a shard."""
    if dtype != "float16":
        return {"rows": rows.to(DTYPES[dtype])}
    largest = torch.stack([part.abs().amax() for part in rows.split(list(sizes), dim=-1)])
    scales = torch.ldexp(torch.ones_like(largest), (torch.frexp(largest).exponent - TOP).clamp(min=-126))
    scales[largest == 0] = 1.0
    return {"rows": (rows / spread(scales, sizes)).half(), "scales": scales}


def decode(stored: Tensor, factors: Tensor | None, place: Tensor) -> None:
    """Write stored numbers `[n, D]` as fp32 into `place`; `factors` are the scales by column."""
    place.copy_(stored)
    if factors is not None:
        place.mul_(factors)


def spread(scales: Tensor, sizes: Sequence[int]) -> Tensor:
    """Scales by slice as scales by column `[D]`."""
    return scales.repeat_interleave(torch.tensor(list(sizes)))


def write_shard(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Write whole or not at all; gives the sha256 of the file."""
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=metadata)
    atomic.write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def row_checksums(stored: Tensor, scales: Tensor | None) -> list[str]:
    """Of every stored row `[n, D]`: over its bytes as they lie in the file, and the scales `[slices]`."""
    array = stored.contiguous().view(torch.uint8).numpy()
    common = b"" if scales is None else scales.numpy().tobytes()
    return [hashlib.blake2b(row.tobytes() + common, digest_size=16).hexdigest() for row in array]


class Shard:
    """One file, memory-mapped when rows are first asked for.

    Raises:
        DataError: It is missing, cut short, or holds other rows than the manifest says.
    """

    def __init__(self, path: Path, rows: int, width: int, dtype: str, sizes: Sequence[int]):
        self.path, self.rows, self.width = path, rows, width
        self.start, tensors = _header(path)
        wanted = {"rows": (NAMES[dtype], [rows, width])}
        if dtype == "float16":
            wanted["scales"] = ("F32", [len(sizes)])
        if {name: (about.get("dtype"), about.get("shape")) for name, about in tensors.items()} != wanted:
            raise DataError(f"{path} does not hold the rows that the corpus names, {rows} of {width} as {dtype}")
        with path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch takes no read-only buffer
        self.first = self.start + tensors["rows"]["data_offsets"][0]
        try:
            self.stored = self._view(tensors["rows"], DTYPES[dtype]).view(rows, width)
            self.scales = self._view(tensors["scales"], torch.float32) if "scales" in tensors else None
            self.factors = None if self.scales is None else spread(self.scales, sizes)
        except (ValueError, RuntimeError) as error:
            raise DataError(f"{path} is damaged: its header says where no bytes are") from error

    def _view(self, about: dict[str, Any], dtype: torch.dtype) -> Tensor:
        first, last = about["data_offsets"]
        count = (last - first) // dtype.itemsize
        return torch.frombuffer(self.map, dtype=dtype, count=count, offset=self.start + first)

    def expect(self, row: int) -> None:
        """Let the system read a row ahead."""
        if hasattr(self.map, "madvise"):
            first = self.stored[row].data_ptr() - self.stored.data_ptr() + self.first
            page = first - first % mmap.PAGESIZE
            self.map.madvise(mmap.MADV_WILLNEED, page, first - page + self.stored[row].nbytes)

    def read(self, first: int, place: Tensor) -> None:
        """Write rows from `first` on into `place`, fp32 `[n, D]`."""
        decode(self.stored[first : first + len(place)], self.factors, place)

    def forget(self) -> None:
        """Give back the memory of pages that were read."""
        if hasattr(self.map, "madvise"):
            self.map.madvise(mmap.MADV_DONTNEED)


def _header(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    if not path.is_file():
        raise DataError(f"{path} is missing: restore it, the corpus has rows in it")
    return read_header(path)


def pieces(starts: Sequence[int], first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """Which rows of which shards are rows first to last - 1 of a corpus: (shard, from, to).

    Args:
        starts: The first row of every shard, and behind them the number of rows.
    """
    for number, (begin, end) in enumerate(zip(starts, starts[1:], strict=False)):
        if begin < last and end > first:
            yield number, max(first, begin) - begin, min(last, end) - begin
