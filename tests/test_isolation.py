"""The guards of `conftest.py` guard: no network, same seeds for every test, no skip of what is required."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ELSEWHERE = "192.0.2.1"  # reserved for documentation by RFC 5737: no machine has it


@pytest.mark.parametrize("call", ["connect", "connect_ex"])
def test_connection_elsewhere_fails_the_test(call: str) -> None:
    with socket.socket() as client, pytest.raises(pytest.fail.Exception, match=ELSEWHERE):
        client.settimeout(0.1)
        getattr(client, call)((ELSEWHERE, 80))


def test_name_lookup_elsewhere_fails_the_test() -> None:
    with pytest.raises(pytest.fail.Exception, match="huggingface"):
        socket.getaddrinfo("huggingface.co", 443)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_this_machine_stays_reachable(host: str) -> None:
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect((host, server.getsockname()[1]))
        assert client.getpeername() == server.getsockname()


def test_hub_is_offline_for_this_process_and_its_children() -> None:
    program = "import os; print(os.environ['HF_HUB_OFFLINE'])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "1"


SKIPPING = """
import random
import pytest

drawn = []

@pytest.mark.slurm
def test_needs_slurm():
    pytest.skip("sbatch not found")

@pytest.mark.slurm
@pytest.mark.xfail(strict=False)
def test_known_to_fail():
    assert False

@pytest.mark.parametrize("again", [0, 1])
def test_draws(again):
    drawn.append(random.random())
    assert len(set(drawn)) == 1
"""


@pytest.mark.parametrize(("require", "failed", "skipped"), [("", 0, 1), ("slurm", 1, 0), ("chromium", 0, 1)])
def test_required_skip_fails(tmp_path: Path, require: str, failed: int, skipped: int) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_skipping.py").write_text(SKIPPING)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slurm\n")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "LITP_REQUIRE": require},
        capture_output=True,
        text=True,
    )
    closing = run.stdout.splitlines()[-1]
    assert ("1 failed" in closing) == bool(failed), run.stdout
    assert ("1 skipped" in closing) == bool(skipped), run.stdout
    assert "2 passed" in closing and "1 xfailed" in closing, run.stdout
    assert not failed or "sbatch not found" in run.stdout
