"""Modes of files that bind root as well: a folder of mode 0555 is read-only for everyone, in any container."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

VERSION, OVERRIDE = 0x20080522, 1 << 1
"""Of Linux' interface, and CAP_DAC_OVERRIDE."""


@contextmanager
def modes_bind() -> Iterator[None]:
    """In this thread, and in processes that it starts by a fork, root is bound by modes as others are."""
    if os.geteuid() != 0 or sys.platform != "linux":
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, of the lower 32 capabilities first

    def call(function: str) -> None:
        if getattr(libc, function)(header, sets) != 0:
            raise OSError(ctypes.get_errno(), function)

    call("capget")
    before = sets[0]
    sets[0] = before & ~OVERRIDE
    call("capset")
    try:
        yield
    finally:
        sets[0] = before
        call("capset")
