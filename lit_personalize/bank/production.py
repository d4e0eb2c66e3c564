"""A process that trains adapters of a job table: claims as slots become free, checkpoints, exports, records.

Several may work on one table, each with a folder of its own in `workers/`: its checkpoints, its lock, its notices. A
process that begins there again goes on from its checkpoint with the adapters that are still its own; those that others
have taken over, or finished, it gives up. What is done is decided by two names that only one process can make:
`exports/ID`, by renaming a folder, and `jobs/done/ID`.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_personalize.bank import checkpoint
from lit_personalize.bank.claims import BEATS, Owner
from lit_personalize.bank.engine import Bank
from lit_personalize.bank.export import is_exported, read_record, write
from lit_personalize.bank.job import AdapterJob, FinishedAdapter
from lit_personalize.bank.job_table import Row
from lit_personalize.errors import DataError, PreemptedError, RunLockedError
from lit_personalize.export.exporter import Exported
from lit_personalize.run_directory import RunDirectory
from lit_personalize.stop_signals import heed, noted

log = logging.getLogger(__name__)
WORKERS, EXPORTS = "workers", "exports"


class Worker(RunDirectory):
    """The folder of one process of a bank."""

    @property
    def pictures(self) -> Path:
        """Of adapters in training whose pictures lie in shards or here and there."""
        return self.path / "pictures"

    @property
    def staged(self) -> Path:
        """Exports before they have their names."""
        return self.path / "staged"

    def create(self) -> Worker:
        for folder in (self.path, self.checkpoints):
            folder.mkdir(parents=True, exist_ok=True)
        return self


def worker_of(folder: Path, name: str = "") -> Worker:
    """Lock a worker's folder: that of a name, or the first that is free.

    Raises:
        RunLockedError: Another process works under that name.
    """
    if name:
        return _emptied(Worker(folder / WORKERS, name))
    number = 0
    while True:
        try:
            return _emptied(Worker(folder / WORKERS, str(number)))
        except RunLockedError:
            number += 1


def _emptied(worker: Worker) -> Worker:
    worker.lock()
    for place in (worker.pictures, worker.staged):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
    return worker


def own_share_first(rows: Sequence[Row], share: tuple[int, int] | None) -> list[Row]:
    """The rows of one of n shares, then the others: from where the share begins, so that not all ask for the same."""
    if share is None:
        return list(rows)
    number, count = share
    return [row for turn in range(count) for row in rows[(number + turn) % count :: count]]


@dataclass
class Production:
    """Train what is free of a table.

    Args:
        bank: Empty; takes up the worker's checkpoint.
        rows: In the order in which they are asked for.
        folder: Of the planned bank.
        worker: Locked.
        owner: Whose heartbeat runs.
        job_of: Makes a row's job.
        every: Steps between two checkpoints.
        details: Noted with every adapter.
        verify: Called with the files of an adapter and how many this process has finished before.
    """

    bank: Bank
    rows: Sequence[Row]
    folder: Path
    worker: Worker
    owner: Owner
    job_of: Callable[[Row], AdapterJob]
    every: int
    details: dict[str, object]
    verify: Callable[[FinishedAdapter, list[Exported], int], None]

    def __post_init__(self) -> None:
        self.finished: list[str] = []
        """By this process, in order."""
        self.begun: dict[str, float] = {}

    def run(self) -> None:
        """Until nothing is free: all others are done, failed, or of owners that live.

        Raises:
            PreemptedError: A cluster's notice, after saving.
            KeyboardInterrupt: Ctrl-C, after saving.
        """
        restored = self._restore()
        while True:
            for finished in self.bank.run(self._jobs(restored), self._between_steps):
                self._end(finished)
            restored = []
            if not self._wait():
                return

    def _restore(self) -> list[Row]:
        """Rows of the worker's checkpoint that are still its own."""
        named = {row.id: row for row in self.rows}
        awaited = checkpoint.restore(self.bank, self.worker.checkpoints)
        if unknown := [name for name in awaited if name not in named]:
            raise DataError(f"{self.worker.checkpoints} trains {unknown[0]}, which is not in the job table: remove it")
        kept = [name for name in awaited if self._claim(named[name])]
        if gone := sorted(set(awaited) - set(kept)):
            log.info("given up, since others have them or they are finished: %s", ", ".join(gone))
            self.bank.give_up(gone)
        return [named[name] for name in kept]

    def _jobs(self, restored: Sequence[Row]) -> Iterator[AdapterJob]:
        """Jobs of rows as they are claimed, which is when a slot is free."""
        for row in restored:
            yield self.job_of(row)
        for row in self.rows:
            if self._claim(row):
                yield self.job_of(row)

    def _claim(self, row: Row) -> bool:
        if not self.owner.claim(row.id):
            return False
        self.begun[row.id] = time.time()
        place = self.folder / EXPORTS / row.id
        if not is_exported(place.parent, row.id):
            return True
        try:  # somebody was killed between its two names
            self._note(row.id, read_record(place))
        except DataError as error:
            log.warning("%s; trained again", error)
            os.rename(place, place.with_name(f".damaged-{row.id}-{secrets.token_hex(4)}"))
            return True
        return False

    def _between_steps(self, bank: Bank) -> None:
        """Save now and then, and at a signal save and end; give up what was taken over."""
        if gone := self.owner.lost():
            log.warning("this process was silent, and others took over %s", ", ".join(gone))
            bank.give_up(gone)
        stopping = noted.notice is not None or noted.interrupt
        if stopping or bank.steps % self.every == 0:
            checkpoint.save(bank, self.worker.checkpoints)
        if stopping:
            name, interrupted = noted.notice.name if noted.notice else "", noted.interrupt
            noted.clear()
            if interrupted:
                raise KeyboardInterrupt(f"saved at step {bank.steps}; the same command continues")
            self.worker.note_preemption(f"{name} step={bank.steps}")
            raise PreemptedError(f"{name}: saved at step {bank.steps}; the same command continues")

    def _wait(self) -> bool:
        """Whether there may be more to claim: put back by somebody, or of an owner that has died.

        Others that live finish their own; how long they are waited for is until their next heartbeat, or they expire.
        """
        since, told = time.monotonic(), False
        while ages := self.owner.silent():
            if any(age > self.owner.expiry for age in ages.values()):
                return True
            if all(age < time.monotonic() - since for age in ages.values()):
                break  # each has shown its heartbeat since
            if not told:
                log.info("waiting for %s, silent for %.0f s", ", ".join(sorted(ages)), max(ages.values()))
                told = True
            heed("nothing is in training")
            if noted.interrupt:
                noted.clear()
                raise KeyboardInterrupt("nothing was in training")
            time.sleep(min(5.0, self.owner.expiry / BEATS))
        seen = self.owner.seen
        return any(row.id not in seen.done | self.owner.held.keys() and not seen.is_failed(row.id)
                   and not seen.is_held(row.id) for row in self.rows)  # fmt: skip

    # ---- ends -------------------------------------------------------------------------------------

    def _end(self, finished: FinishedAdapter) -> None:
        """Export an adapter and note it as done, or note why it failed."""
        name = finished.job.id
        shutil.rmtree(self.worker.pictures / name, ignore_errors=True)
        if name not in self.owner.held:
            return
        if finished.failure:
            log.warning("%s failed: %s", name, finished.failure)
            self.owner.fail(name, finished.failure)
            return
        place = self.folder / EXPORTS / name
        row = next(row for row in self.rows if row.id == name)
        try:
            files = write(finished, place.parent, self.bank, details=self.details, labels=row.labels, replace=False,
                          staging=self.worker.staged)  # fmt: skip
        except FileExistsError:
            log.info("%s was exported by another process", name)
        else:
            self.verify(finished, files, len(self.finished))
        if self._note(name, read_record(place)):
            self.finished.append(name)
            done = len(self.owner.seen.done)
            log.info("%s: %d steps, loss %.4f (%d of %d)", name, finished.job.steps, finished.losses[-1], done,
                     len(self.rows))  # fmt: skip

    def _note(self, name: str, record: dict[str, Any]) -> bool:
        """Make `done/ID`; false if another process made it."""
        told = {key: record.get(key) for key in ("sha256", "seed", "steps", "loss")}
        return self.owner.finish(name, {**told, "seconds": round(time.time() - self.begun[name], 1)})
