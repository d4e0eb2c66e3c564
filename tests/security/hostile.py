"""Files that mean harm, made at run time; what they would do is to make the file `RAN` in the working directory."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RAN = "RAN"


class Payload:
    """Unpickled, it calls `open(RAN, "w")`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (RAN, "w")


def ran() -> bool:
    """Whether any payload was run."""
    return Path(RAN).exists()


def bare_pickle() -> bytes:
    return pickle.dumps({"layer": Payload()})


def torch_archive() -> bytes:
    """As `torch.save` writes it today: a zip with a pickle in it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"layer": Payload()}))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return out.getvalue()


def object_array() -> bytes:
    """A `.npy` of objects, which are pickled."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1, 1), }"
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + pickle.dumps([Payload()])


def safetensors(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with a header as it is given, and of the length that it claims."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], *offsets: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


SAFETENSORS: dict[str, bytes] = {
    "a header of 2^60 bytes": safetensors({"a": entry([2], 0, 8)}, bytes(8), 1 << 60),
    "a header of 99 MB that is not there": safetensors(b"{", b"", 99_000_000),
    "two bytes": b"\x01\x02",
    "nothing": b"",
    "200,000 nested lists": safetensors(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "overlapping tensors": safetensors({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
    "offsets outside of the file": safetensors({"a": entry([2], 0, 1 << 40)}, bytes(8)),
    "negative offsets": safetensors({"a": entry([2], -8, 0)}, bytes(8)),
    "offsets in reverse": safetensors({"a": entry([2], 8, 0)}, bytes(8)),
    "a gap": safetensors({"a": entry([2], 8, 16)}, bytes(16)),
    "bytes behind the tensors": safetensors({"a": entry([2], 0, 8)}, bytes(8) + pickle.dumps(Payload())),
    "a name that stands twice": safetensors(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F16","shape":[4],"data_offsets":[0,8]}}',
        bytes(8),
    ),
    "another shape than bytes": safetensors({"a": entry([4], 0, 8)}, bytes(8)),
    "a shape of 2^124 values": safetensors({"a": entry([1 << 62, 1 << 62], 0, 8)}, bytes(8)),
    "an unknown dtype": safetensors({"a": entry([2], 0, 8, dtype="PICKLE")}, bytes(8)),
    "a list for a header": safetensors(b"[1, 2, 3]"),
    "no JSON": safetensors(b"{nope"),
    "metadata that is no text": safetensors({"__metadata__": {"x": [1]}, "a": entry([2], 0, 8)}, bytes(8)),
    "integers": safetensors({"a": entry([1], 0, 8, dtype="I64")}, bytes(8)),
    "NaN": safetensors({"a": entry([2], 0, 8)}, b"\xff" * 8),
    "a version that is no number": safetensors(
        {"__metadata__": {"litp.format_version": "²"}, "a": entry([2], 0, 8)}, bytes(8)
    ),
}
"""By what is wrong; each is refused by every reader of adapters, and as a file of a cache."""


def tar(members: Iterable[tuple[str, bytes | str, bytes]]) -> bytes:
    """A shard of members (name, bytes or the target of a link, type)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if isinstance(content, bytes):
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                info.linkname = content
                archive.addfile(info)
    return out.getvalue()


def picture(width: int = 8, height: int = 8) -> bytes:
    """A PNG of one colour that is small however many pixels it has."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = zlib.compressobj(9)
    rows = b"".join(row.compress(bytes(1 + width)) for _ in range(min(height, 64))) + row.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


EVIL_MODULE = f"open({RAN!r}, 'w').close()\n\nclass Evil:\n    pass\n\ndef run(*_):\n    pass\n"
ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
"""Ten lines that hold ten billion values."""
