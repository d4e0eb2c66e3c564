"""Claims on a job table: whatever happens at the same instant, one process has an adapter; what is dead is taken over.

Processes that are killed or suspended here are real ones.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lit_personalize.bank.claims import Ledger, Owner
from lit_personalize.bank.progress import Watch
from lit_personalize.errors import UsageError

CLAIMANTS, ADAPTERS = 8, 200
SHARE = """
import sys
from pathlib import Path
from lit_personalize.bank.claims import Ledger, Owner
folder, worker, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with Owner(Ledger(folder), worker) as owner:
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(count):
        if owner.claim(f"a{number}"):
            print(f"a{number}", flush=True)
            owner.finish(f"a{number}", {})
"""
HOLD = """
import sys, time
from pathlib import Path
from lit_personalize.bank.claims import Ledger, Owner
with Owner(Ledger(Path(sys.argv[1])), "holder", float(sys.argv[2])) as owner:
    print([owner.claim(name) for name in ("a", "b")], flush=True)
    for line in sys.stdin:
        print(sorted(owner.lost()), sorted(owner.held), flush=True)
"""


@contextmanager
def process(program: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, *arguments]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def said(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def ask(child: subprocess.Popen[str]) -> str:
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()
    return said(child)


def at_once(owners: list[Owner], name: str) -> list[Owner]:
    """Who gets an adapter when all claim it at the same instant."""
    barrier = threading.Barrier(len(owners))
    winners = []

    def claim(owner: Owner) -> None:
        barrier.wait()
        if owner.claim(name):
            winners.append(owner)

    threads = [threading.Thread(target=claim, args=(owner,)) for owner in owners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return winners


def test_one_of_many_gets_it_at_the_same_instant(tmp_path: Path) -> None:
    """First claims, then all of them again when their owners are dead: attempt 2 is given once, too."""
    ledger = Ledger(tmp_path)
    owners = [Owner(ledger, f"w{number}") for number in range(CLAIMANTS)]
    for number in range(ADAPTERS):
        assert len(at_once(owners, f"a{number}")) == 1, f"a{number}"
    assert sorted(name for owner in owners for name in owner.held) == sorted(f"a{n}" for n in range(ADAPTERS))
    later = [Owner(ledger, f"v{number}") for number in range(CLAIMANTS)]  # of the first, none ever had a heartbeat
    for owner in later:
        owner.refresh()
    for number in range(ADAPTERS):
        assert len(at_once(later, f"a{number}")) == 1, f"a{number}"
    assert all(attempt == 2 for owner in later for attempt in owner.held.values())
    assert sum(len(owner.held) for owner in later) == ADAPTERS


def test_processes_share_a_table(tmp_path: Path) -> None:
    """Each adapter is trained by one of four, though all ask for all in the same order."""
    with process(SHARE, str(tmp_path), "0", "200") as a, process(SHARE, str(tmp_path), "1", "200") as b, \
            process(SHARE, str(tmp_path), "2", "200") as c, process(SHARE, str(tmp_path), "3", "200") as d:  # fmt: skip
        children = (a, b, c, d)
        assert [said(child) for child in children] == ["ready"] * 4
        for child in children:
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
        trained = [child.communicate()[0].split() for child in children]
    assert sorted(sum(trained, [])) == sorted(f"a{number}" for number in range(200))
    assert sum(bool(names) for names in trained) > 1, "one process did all: the others came too late to race"
    assert Ledger(tmp_path).names("claims") == [] and len(Ledger(tmp_path).names("done")) == 200


def test_a_dead_owner_is_taken_over_and_a_slow_one_is_not(tmp_path: Path) -> None:
    ledger, expiry = Ledger(tmp_path), 1.0
    with process(HOLD, str(tmp_path), str(expiry)) as holder, Owner(ledger, "other", expiry) as other:
        assert said(holder) == "[True, True]"
        end = time.monotonic() + 3 * expiry
        while time.monotonic() < end:  # its main thread only waits; its heartbeat is another thread's
            other.refresh()
            assert not other.claim("a")
            time.sleep(0.1)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        killed = time.monotonic()
        other.refresh()
        assert not other.claim("a"), "its last heartbeat is not old enough"
        assert 0 <= max(other.silent().values()) < expiry
        while not other.claim("a"):
            other.refresh()
            assert time.monotonic() < killed + 20 * expiry
            time.sleep(0.02)
        assert time.monotonic() - killed > 0.8 * expiry
        assert other.held == {"a": 2}


def test_a_suspended_owner_gives_up_what_was_taken_over(tmp_path: Path) -> None:
    """As Slurm suspends jobs: what another took meanwhile is not its own any more, and only one record counts."""
    ledger, expiry = Ledger(tmp_path), 0.6
    with process(HOLD, str(tmp_path), str(expiry)) as holder, Owner(ledger, "other", expiry) as other:
        assert said(holder) == "[True, True]"
        holder.send_signal(signal.SIGSTOP)
        end = time.monotonic() + 30
        while not other.claim("a"):
            other.refresh()
            assert time.monotonic() < end
            time.sleep(0.02)
        holder.send_signal(signal.SIGCONT)
        assert ask(holder) == "['a'] ['b']"


def test_of_two_who_finish_one_counts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    first, second = Owner(ledger, "first"), Owner(ledger, "second")
    assert first.claim("a")
    second.refresh()
    assert second.claim("a") and second.held == {"a": 2}
    assert not first.holds("a")
    assert second.finish("a", {"sha256": {}}) and not first.finish("a", {"sha256": {}})
    assert ledger.read("done/a")["worker"] == "second" and ledger.read("done/a")["attempt"] == 2
    assert ledger.names("claims") == []
    assert not Owner(ledger, "third").claim("a"), "also to one who has not looked since"


def test_a_place_takes_up_its_own_at_once(tmp_path: Path) -> None:
    """The next process of a worker's folder, which is locked, need not wait until its predecessor expires."""
    ledger = Ledger(tmp_path)
    with Owner(ledger, "3-of-8") as before:
        assert before.claim("a")
    with Owner(ledger, "3-of-8") as now, Owner(ledger, "4-of-8") as neighbour:
        assert not neighbour.claim("a")
        assert now.claim("a") and now.held == {"a": 2}


def test_failed_ones_wait_for_retry(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    with Owner(ledger, "w") as owner:
        assert owner.claim("a")
        owner.fail("a", "the loss was not finite")
        owner.refresh()
        assert not owner.claim("a")
        told = Watch(ledger, ["a", "b"]).look()
        assert told.failed == {"a": "the loss was not finite"} and (told.waiting, told.done) == (1, 0)
        assert ledger.retry("a", 1) and not ledger.retry("a", 1)
        assert Watch(ledger, ["a", "b"]).look().waiting == 2
        owner.refresh()
        assert owner.claim("a") and owner.held == {"a": 2}, "attempts are counted on"
        owner.finish("a", {})
    assert ledger.read("done/a")["attempt"] == 2 and ledger.names("failed") == []


def test_damaged_records(tmp_path: Path) -> None:
    """A claim that is cut short belongs to nobody once it is old; a foreign file in a folder is passed over."""
    ledger = Ledger(tmp_path)
    claim = tmp_path / "claims/a.1"
    claim.write_text('{"own')
    (tmp_path / "claims/README").write_text("x")
    owner = Owner(ledger, "w", 60)
    owner.refresh()
    assert not owner.claim("a")
    os.utime(claim, (time.time() - 61,) * 2)
    assert owner.claim("a") and owner.held == {"a": 2}
    (tmp_path / "failed/b.1").write_text("")
    (tmp_path / "claims/b.1").write_text(json.dumps({"owner": "x"}))
    assert Watch(ledger, ["a", "b"]).look().failed == {"b": "its record is damaged"}


def test_a_file_system_without_links_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")  # as FAT and some network drives say it

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(UsageError, match="without hard links"):
        Owner(Ledger(tmp_path), "w").claim("a")


def test_rates_and_time_left(tmp_path: Path) -> None:
    """Two of three hours' adapters are done in the last hour."""
    ledger = Ledger(tmp_path)
    with Owner(ledger, "w") as owner:
        for name in "abcdef":
            assert owner.claim(name)
            if name != "f":
                owner.finish(name, {})
        now = time.time()
        for name, hours in zip("abcde", (2.5, 2.0, 1.5, 0.5, 0.4), strict=True):
            os.utime(tmp_path / "done" / name, (now - 3600 * hours,) * 2)
        told = json.loads((tmp_path / owner._file).read_text()) | {"start": now - 3 * 3600}
        (tmp_path / owner._file).write_text(json.dumps(told))
        seen = Watch(ledger, list("abcdefghi")).look()
    assert (seen.done, seen.waiting, [one.adapters for one in seen.running]) == (5, 3, [["f"]])
    assert seen.per_hour == pytest.approx(2, rel=0.01)
    assert seen.per_hour_in_all == pytest.approx(5 / 3, rel=0.01)
    assert seen.eta == pytest.approx(4 / 2 * 3600, rel=0.01)
