"""Pictures that stay where they are until a step shows them: what lets a set be larger than memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lit_datamodules.errors import DataError
from lit_datamodules.image_files import decode_image, shrink_factor, shrunk
from lit_datamodules.manifest import sha256_of
from lit_datamodules.tar_index import Member


@dataclass(frozen=True)
class StoredPicture:
    """A picture in a shard.

    Args:
        name: `shard.tar:key`, for messages.
        original: Height and width of the upright picture.
        longest: Shorter side in pixels above which it is shrunk.
        identity: Changes with its bytes.
        sha256: Of the file, where it is known: a JPEG with flipped bytes is still a picture.
    """

    shard: Path
    member: Member
    name: str
    original: tuple[int, int]
    longest: int
    identity: str
    sha256: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of `load()`."""
        factor = shrink_factor(self.original, self.longest)
        return -(-self.original[0] // factor), -(-self.original[1] // factor)

    def load(self) -> np.ndarray:
        """uint8 `[H, W, 3]`.

        Raises:
            DataError: The shard is gone, or the picture is damaged or another one than when it was indexed.
        """
        try:
            descriptor = os.open(self.shard, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"cannot read sample {self.name}: {error.strerror}") from error
        try:
            data = os.pread(descriptor, self.member.size, self.member.offset)
        finally:
            os.close(descriptor)
        if self.sha256 and sha256_of(data) != self.sha256:
            raise DataError(f"sample {self.name} is damaged: its sha256 is not the one that its json states")
        picture = shrunk(decode_image(data, f"sample {self.name}"), self.longest)
        if picture.size != self.size:
            raise DataError(f"sample {self.name} is {picture.size}, not {self.size} as at the start; the shard changed")
        return picture.pixels
