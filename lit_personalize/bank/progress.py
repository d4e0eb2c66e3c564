"""How far a job table is: from the names and times of its records. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_personalize.bank.claims import EXPIRY, Ledger, Snapshot

RECENT = 3600.0
"""Seconds of the rate "now"."""


def failures(ledger: Ledger, seen: Snapshot) -> dict[str, str]:
    """Why adapters failed at last, by id."""
    names = sorted(name for name in seen.attempts if seen.is_failed(name))
    return {name: str(reason_of(ledger, name, seen.attempts[name])) for name in names}


def reason_of(ledger: Ledger, name: str, attempt: int) -> str:
    return str(ledger.read(f"failed/{name}.{attempt}").get("reason", "its record is damaged"))


@dataclass(frozen=True)
class Running:
    """One process that has adapters in training."""

    worker: str
    host: str
    job: str
    adapters: list[str]
    silent: float
    """Seconds since its heartbeat."""


@dataclass(frozen=True)
class Progress:
    """A table at one moment."""

    adapters: int
    done: int
    running: list[Running]
    failed: dict[str, str]
    waiting: int
    attempts: dict[str, int]
    """Of those in training that were begun more than once."""
    per_hour: float | None
    """Over the last hour, or since the first process began where that is later."""
    per_hour_in_all: float | None
    eta: float | None
    """Seconds until nothing waits, at the rate of the last hour."""

    def report(self) -> dict[str, Any]:
        """Plain types."""
        running = [{**vars(one), "silent": round(one.silent, 1)} for one in self.running]
        rates = {"adapters/hour": self.per_hour, "adapters/hour in all": self.per_hour_in_all, "eta": self.eta}
        return {
            "adapters": self.adapters, "done": self.done, "in training": sum(len(one.adapters) for one in self.running),
            "failed": self.failed, "waiting": self.waiting, "running": running, "attempts": self.attempts,
            **{name: None if value is None else round(value, 1) for name, value in rates.items()},
        }  # fmt: skip


@dataclass
class Watch:
    """Look at a table again and again; records that cannot change are read once."""

    ledger: Ledger
    ids: Sequence[str]
    expiry: float = EXPIRY
    _times: dict[str, float] = field(default_factory=dict)
    _starts: dict[str, float] = field(default_factory=dict)

    def look(self) -> Progress:
        ledger, ids = self.ledger, set(self.ids)
        seen = ledger.snapshot()
        now = ledger.now()
        done = ids & seen.done
        for name in done - self._times.keys():
            self._times[name] = (ledger.folder / "done" / name).stat().st_mtime
        failed = {name: why for name, why in failures(ledger, seen).items() if name in ids}
        running = self._running(seen, ids, now)
        active = sum(len(one.adapters) for one in running)
        start = self._start(now)
        times = [self._times[name] for name in done]
        last = sum(now - when <= RECENT for when in times)
        spent = min(RECENT, now - start)
        rate = last / spent * 3600 if last and spent > 0 else None
        left = len(ids) - len(done) - len(failed)
        held = [name for one in running for name in one.adapters]
        return Progress(
            len(ids), len(done), running, failed, left - active,
            {name: seen.attempts[name] for name in held if seen.attempts[name] > 1}, rate,
            len(done) / (now - start) * 3600 if done and now > start else None,
            left / rate * 3600 if rate else (0.0 if not left else None),
        )  # fmt: skip

    def _running(self, seen: Snapshot, ids: set[str], now: float) -> list[Running]:
        """Owners of what is held; what a dead one holds counts as waiting."""
        held: dict[str, list[str]] = {}
        for name, attempt in sorted(seen.attempts.items()):
            if name in ids and seen.is_held(name):
                claim = self.ledger.read(f"claims/{name}.{attempt}")
                if "owner" in claim:
                    held.setdefault(str(claim["owner"]), []).append(name)
        found = []
        for owner, names in held.items():
            try:
                silent = now - (self.ledger.folder / "owners" / owner).stat().st_mtime
            except FileNotFoundError:
                continue
            told = self.ledger.read(f"owners/{owner}")
            job = told.get("job", {})
            task = "_".join(filter(None, (job.get("SLURM_JOB_ID"), job.get("SLURM_ARRAY_TASK_ID"))))
            if silent <= self.expiry:
                found.append(Running(str(told.get("worker", owner)), str(told.get("host", "")), task, names,
                                     max(0.0, silent)))  # fmt: skip
        return found

    def _start(self, now: float) -> float:
        """When the first process began."""
        for name in self.ledger.names("owners"):
            if name not in self._starts:
                self._starts[name] = float(self.ledger.read(f"owners/{name}").get("start", now))
        return min([*self._starts.values(), *self._times.values(), now])


def clock(seconds: float | None) -> str:
    """`3 d 04:05`, or `04:05:06`."""
    if seconds is None:
        return "-"
    days, rest = divmod(int(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    return f"{days} d {hours:02}:{rest // 60:02}" if days else f"{hours:02}:{rest // 60:02}:{rest % 60:02}"
