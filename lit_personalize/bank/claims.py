"""Who trains which adapter of a job table: files whose names are made once, and never by two.

    claims/ID.K     attempt K at adapter ID belongs to the owner named in it; the highest K is the one that counts
    failed/ID.K     attempt K failed, for the reason in it; `retried/ID.K` once somebody put it back
    done/ID         the adapter is finished: attempt, owner, files with their sha256
    owners/NAME     a process that trains; its time of change is its heartbeat

Every step is the creation of one name by `link`, which is atomic on NFS, too, and fails where the name exists: of any
number of claimants at the same instant one gets attempt K. Nothing is ever moved out of another's hands: an attempt
whose owner is silent for longer than `expiry` is passed over by making attempt K+1, and whoever sees the old state can
only ask for a number that is taken. An owner that was silent and comes back finds K+1 there, and gives up; if it has
finished meanwhile, `done/ID` is made once, and only one of the two counts.

Ages are differences of times that the file system gave to two files, so clocks of machines need not agree.
SQLite is not used since its locks are those of the file system, which NFS does not keep reliably.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_personalize import atomic
from lit_personalize.errors import UsageError

log = logging.getLogger(__name__)
JOBS = "jobs"
"""Folder of a planned bank that holds them."""
FOLDERS = ("claims", "done", "failed", "retried", "owners")
EXPIRY = 600.0
"""Seconds after which a silent owner is taken for dead."""
BEATS = 20
"""Heartbeats within that time."""
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@dataclass
class Snapshot:
    """What the names said when they were listed."""

    attempts: dict[str, int] = field(default_factory=dict)
    """Highest attempt of each adapter that was ever claimed and is not done."""
    failed: set[tuple[str, int]] = field(default_factory=set)
    retried: set[tuple[str, int]] = field(default_factory=set)
    done: set[str] = field(default_factory=set)

    def is_failed(self, name: str) -> bool:
        """Whether the last attempt failed and was not put back."""
        last = (name, self.attempts.get(name, 0))
        return name not in self.done and last in self.failed and last not in self.retried

    def is_held(self, name: str) -> bool:
        """Whether somebody has claimed it and did not end."""
        last = (name, self.attempts.get(name, 0))
        return name not in self.done and last[1] > 0 and last not in self.failed | self.retried


class Ledger:
    """The claims of one job table; makes its folders.

    Raises:
        UsageError: The file system has no hard links.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        for name in FOLDERS:
            (folder / name).mkdir(parents=True, exist_ok=True)

    def create(self, place: str, record: Mapping[str, Any], durable: bool = True) -> bool:
        """Make a file with a record, whole, unless its name exists.

        Returns:
            Whether this call made it.
        """
        path = self.folder / place
        temporary = path.with_name(f".{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")
        temporary.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
        try:
            if durable:
                atomic.flush(temporary)
            os.link(temporary, path)
        except FileExistsError:
            return temporary.stat().st_nlink == 2  # the answer of a server was lost, and the question repeated
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            raise UsageError(
                f"{self.folder} is on a file system without hard links, which claims are made of: put the bank's "
                "folder on another one, such as NFS, Lustre or a local disk"
            ) from error
        finally:
            temporary.unlink()
        if durable:
            atomic.flush(path.parent)
        return True

    def read(self, place: str) -> dict[str, Any]:
        """A record; empty where it is gone, or damaged."""
        try:
            found = json.loads((self.folder / place).read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {}
        except (FileNotFoundError, ValueError):
            return {}

    def exists(self, place: str) -> bool:
        return (self.folder / place).exists()

    def names(self, folder: str) -> list[str]:
        return [name for name in os.listdir(self.folder / folder) if not name.startswith(".")]

    def snapshot(self) -> Snapshot:
        """List all names. `done` last: what leaves `claims` meanwhile is found there."""
        found = Snapshot(failed=set(self._numbered("failed")), retried=set(self._numbered("retried")))
        for name, attempt in self._numbered("claims"):
            found.attempts[name] = max(attempt, found.attempts.get(name, 0))
        found.done = set(self.names("done"))
        return found

    def _numbered(self, folder: str) -> Iterable[tuple[str, int]]:
        for entry in self.names(folder):
            name, _, number = entry.rpartition(".")
            if name and number.isdecimal():
                yield name, int(number)

    def retry(self, name: str, attempt: int) -> bool:
        """Put a failed attempt back; false if somebody was faster."""
        return self.create(f"retried/{name}.{attempt}", {"time": time.time()})

    def now(self) -> float:
        """The file system's time; this machine's where nothing can be written."""
        probe = self.folder / "owners" / f".now-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            probe.touch()
            return _changed(probe)
        except PermissionError:
            return time.time()
        finally:
            with suppress(OSError):
                probe.unlink()

    def age(self, place: str) -> float:
        """Seconds since a file changed, by the clock of the file system; infinite if it is gone."""
        now = self.now()
        try:
            return now - _changed(self.folder / place)
        except FileNotFoundError:
            return float("inf")


class Owner:
    """A process that claims adapters, and shows that it lives by a heartbeat of its own thread.

    Args:
        ledger: Of the table.
        worker: Names the place whose checkpoints this process continues. It must be locked: claims of an earlier
            process of that place are taken for its own, at once.
        expiry: Seconds of silence after which others' claims are taken over.
    """

    def __init__(self, ledger: Ledger, worker: str, expiry: float = EXPIRY):
        if expiry <= 0:
            raise UsageError(f"a claim expires after a positive number of seconds, not {expiry:g}")
        self.ledger, self.worker, self.expiry = ledger, worker, expiry
        self.name = f"{worker}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
        self.held: dict[str, int] = {}
        """Attempt of each adapter that is ours."""
        self.seen = Snapshot()
        self._beaten = time.monotonic()
        self._late = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)

    def __enter__(self) -> Owner:
        job = {name: os.environ[name] for name in ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID") if name in os.environ}
        told = {"worker": self.worker, "host": socket.gethostname(), "pid": os.getpid(), "start": time.time()}
        self.ledger.create(self._file, told | ({"job": job} if job else {}))
        self.refresh()
        self._beaten = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the heartbeat. What is still held waits for this place's next process, until it expires."""
        self._end.set()
        self._thread.join()

    @property
    def _file(self) -> str:
        return f"owners/{self.name}"

    def _beat(self) -> None:
        while not self._end.wait(self.expiry / BEATS):
            try:
                os.utime(self.ledger.folder / self._file)
            except OSError as error:
                log.warning("no heartbeat: %s", error)
                continue
            now = time.monotonic()
            self._late = self._late or now - self._beaten > self.expiry / 2
            self._beaten = now

    # ---- claiming ---------------------------------------------------------------------------------

    def refresh(self) -> Snapshot:
        """List again what others did."""
        self.seen = self.ledger.snapshot()
        return self.seen

    def claim(self, name: str) -> bool:
        """Get an adapter, if it is free: never claimed, put back, or of an owner that is dead."""
        seen = self.seen
        last = seen.attempts.get(name, 0)
        if name in self.held or name in seen.done or seen.is_failed(name):
            return False
        if seen.is_held(name) and not self._is_over(name, last):
            return False
        attempt = last + 1
        if not self.ledger.create(f"claims/{name}.{attempt}", {"owner": self.name, "worker": self.worker}, False):
            seen.attempts[name] = attempt  # whose it is will be asked when all others are gone
            return False
        seen.attempts[name] = attempt
        if self.ledger.exists(f"done/{name}"):  # since the names were listed
            seen.done.add(name)
            self._remove_claims(name, attempt)
            return False
        self.held[name] = attempt
        return True

    def _is_over(self, name: str, attempt: int) -> bool:
        """Whether an attempt that did not end will not."""
        place = f"claims/{name}.{attempt}"
        claim = self.ledger.read(place)
        if claim.get("owner") == self.name:
            return False
        if claim.get("worker") == self.worker:
            return True
        return self.ledger.age(f"owners/{claim['owner']}" if "owner" in claim else place) > self.expiry

    def lost(self) -> list[str]:
        """Adapters that others took over while this process was silent; they are not held any more.

        Costs nothing where every heartbeat was in time.
        """
        if not self._late and time.monotonic() - self._beaten < self.expiry / 2:
            return []
        self._late = False
        gone = [name for name in self.held if not self.holds(name)]
        for name in gone:
            del self.held[name]
        return gone

    def holds(self, name: str) -> bool:
        """Whether nobody took it over, or finished it."""
        attempt = self.held[name]
        return not self.ledger.exists(f"claims/{name}.{attempt + 1}") and not self.ledger.exists(f"done/{name}")

    def silent(self) -> dict[str, float]:
        """Seconds of silence of the owners of what is neither finished, failed nor ours."""
        seen = self.refresh()
        ages: dict[str, float] = {}
        for name, attempt in seen.attempts.items():
            if name in self.held or not seen.is_held(name):
                continue
            claim = self.ledger.read(f"claims/{name}.{attempt}")
            who = claim.get("owner", f"the damaged claim {name}.{attempt}")
            if who not in ages:
                ages[who] = self.ledger.age(f"owners/{who}" if "owner" in claim else f"claims/{name}.{attempt}")
        return ages

    # ---- ending -----------------------------------------------------------------------------------

    def finish(self, name: str, record: Mapping[str, Any]) -> bool:
        """Note an adapter as done; false if another process finished it first."""
        attempt = self.held.pop(name)
        told = {"attempt": attempt, "owner": self.name, "worker": self.worker, "time": time.time(), **record}
        first = self.ledger.create(f"done/{name}", told)
        self.seen.done.add(name)
        self._remove_claims(name, attempt)
        return first

    def fail(self, name: str, reason: str) -> None:
        """Note why an attempt failed; `Ledger.retry` puts it back."""
        attempt = self.held.pop(name)
        told = {"reason": reason, "owner": self.name, "worker": self.worker, "time": time.time()}
        self.ledger.create(f"failed/{name}.{attempt}", told)
        self.seen.failed.add((name, attempt))

    def _remove_claims(self, name: str, attempt: int) -> None:
        """Of what is done, for which no claim counts."""
        for number in range(1, attempt + 1):
            for folder in ("claims", "failed", "retried"):
                with suppress(FileNotFoundError):
                    (self.ledger.folder / folder / f"{name}.{number}").unlink()


def _changed(path: Path) -> float:
    """Time of change, asked of the server: opening a file makes NFS look again."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)
