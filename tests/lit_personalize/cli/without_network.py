"""Run one `litp` line after the other in a process without network; every try to reach it is noted, and fails.

    python without_network.py NOTES LINE [LINE ...]

Listening on this machine reaches nobody (urllib3 does, to learn whether there is IPv6), so that it is let be.
"""

from __future__ import annotations

import shlex
import socket
import sys
import traceback
from typing import Any

NOTES = sys.argv[1]
INTERNET = (socket.AF_INET, socket.AF_INET6)


def note(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: it sees every call, whatever has been imported, patched or caught."""
    address: Any = ""
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        address = arguments[0]
    elif event in ("socket.connect", "socket.sendto") and arguments[0].family in INTERNET:
        address = arguments[1]
    elif event == "urllib.Request":
        address = arguments[0]
    if address:
        with open(NOTES, "a", encoding="utf-8") as file:
            file.write(f"{event} {address}\n{''.join(traceback.format_stack(limit=12))}\n")
        raise OSError(f"no network here: {event} {address}")


if __name__ == "__main__":
    sys.addaudithook(note)
    from lit_personalize.cli.main import main

    for line in sys.argv[2:]:
        words = shlex.split(line)
        if words[0] == "python":
            exec(words[1])
        elif code := main(words[1:]):
            sys.exit(code)
