"""What every test can rely on: fixed seeds, two threads, no network, and no skip where `LITP_REQUIRE` forbids it.

`LITP_REQUIRE=slurm,chromium` names markers: a test that carries one of them and skips has failed.
"""

from __future__ import annotations

import ipaddress
import os
import random
import shutil
import signal
import socket
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `file_modes`

# Read when torch and huggingface_hub are first imported, also by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if shutil.which("nvidia-smi") is None:  # read when Triton is first imported: its kernels run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Seed every global generator, so that a test's result does not depend on the tests before it."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """A command that was told to stop ignores further notices, and so would every process that later tests start."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler and handler is not None:
            signal.signal(number, handler)


def _is_local(host: str | bytes | None) -> bool:
    name = host.decode() if isinstance(host, bytes) else host or ""
    if name in ("", "localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Fail any test whose process looks up or connects to another machine; this machine stays reachable.

    `pytest.fail` raises outside `Exception`, so no fallback on connection errors can hide the attempt.
    """
    real_connect, real_connect_ex, real_lookup = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo
    own = {info[4][0] for info in _own_addresses()}

    def check(host: Any, what: str) -> None:
        if not (_is_local(host) or host in own):
            pytest.fail(f"a test may not use the network: {what} {host!r}")

    def connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            check(address[0], "connection to")
        return real_connect(self, address)

    def connect_ex(self: socket.socket, address: Any) -> int:
        if self.family != socket.AF_UNIX:
            check(address[0], "connection to")
        return real_connect_ex(self, address)

    def getaddrinfo(host: Any, *args: Any, **options: Any) -> Any:
        check(host, "name lookup of")
        return real_lookup(host, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        patch.setattr(socket.socket, "connect_ex", connect_ex)
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield


def _own_addresses() -> list[Any]:
    try:
        return socket.getaddrinfo(socket.gethostname(), None)
    except socket.gaierror:  # a machine whose own name does not resolve
        return []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn the skip of a required test into a failure."""
    report = yield
    required = {name.strip() for name in os.environ.get("LITP_REQUIRE", "").split(",")}
    missing = required & {marker.name for marker in item.iter_markers()}
    if report.skipped and missing and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"LITP_REQUIRE names {', '.join(sorted(missing))}, yet this test skipped: {report.longrepr}"
    return report
