"""Weights out of pickles of other programs: numbers and names alone, never their code."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from pathlib import Path

import torch

from lit_personalize.errors import DataError

MAGIC = (b"PK\x03\x04", b"\x80")
"""First bytes of the two formats of `torch.save`."""
GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
DAMAGE = (
    RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError, struct.error,
)  # fmt: skip
"""What reading a file raises that is none of `torch.save`, or not the whole of it."""


def is_pickle(path: Path) -> bool:
    """Whether a file begins as a pickle does.

    A safetensors file has its header's length in 8 bytes, which may look like a pickle's first, and then "{".
    """
    with path.open("rb") as stream:
        head = stream.read(16)
    return head.startswith(MAGIC[0]) or (head.startswith(MAGIC[1]) and head[8:9] != b"{")


def read_pickle(path: Path, mapped: bool = False) -> object:
    """What a file of `torch.save` holds, by PyTorch's reader of weights alone (`weights_only=True`), on the CPU.

    Args:
        mapped: Leave the tensors' bytes on the disk until they are used; not for the format before PyTorch 1.6.

    Raises:
        DataError: It wants to run code, is damaged, or is none of `torch.save`.
    """
    if not is_pickle(path):
        raise DataError(f"{path} is neither a safetensors file nor one of torch.save")
    try:
        with warnings.catch_warnings(), path.open("rb") as stream:  # by its name torch.load may take another reader
            warnings.simplefilter("ignore")  # of protocols and archives, before the error that says the same
            if mapped and path.suffix == ".pt" and zipfile.is_zipfile(path):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = GLOBAL.search(str(error))
        what = f"asks for {wanted[1]}" if wanted else "holds more than weights"
        raise DataError(
            f"{path} {what}: loading it could run code, so nothing of it was loaded; "
            "have its author save the tensors alone, best as .safetensors"
        ) from error
    except DAMAGE as error:
        reason = str(error).partition(".")[0] or type(error).__name__
        raise DataError(f"{path} is not a whole file of torch.save: {reason}") from error
