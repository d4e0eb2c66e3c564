"""A published checkpoint is whole; a reader finds the newest whole one and says why it passed over others."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from file_modes import modes_bind

from lit_personalize import checkpoints
from lit_personalize.checkpoints import MARK, PublishError, directory, find_best, find_complete, publish, published


def fill(folder: Path) -> None:
    (folder / "state.ckpt").write_bytes(bytes(range(256)) * 20)
    (folder / "shards").mkdir()
    (folder / "shards/rank-0.bin").write_bytes(b"shard")


@pytest.fixture
def three(tmp_path: Path) -> Path:
    for step in (10, 20, 30):
        publish(tmp_path, step, fill, details={"metric": 0.5})
    return tmp_path


def test_mark_names_every_file(three: Path) -> None:
    mark = json.loads((directory(three, 20) / MARK).read_text())
    assert mark["step"] == 20 and mark["metric"] == 0.5 and mark["format"] == 1
    assert set(mark["files"]) == {"state.ckpt", "shards/rank-0.bin"}
    assert mark["files"]["state.ckpt"]["bytes"] == 5120
    assert mark["files"]["shards/rank-0.bin"]["sha256"] == hashlib.sha256(b"shard").hexdigest()
    found = find_complete(three)
    assert found is not None and (found.step, found.path.name, found.skipped) == (30, "step-00000030", [])


def test_nothing_there(tmp_path: Path) -> None:
    assert find_complete(tmp_path) is None
    assert find_complete(tmp_path / "absent") is None


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda d: flip(d / "state.ckpt"), "state.ckpt has another sha256"),
        (lambda d: os.truncate(d / "state.ckpt", 100), "state.ckpt has 100 bytes instead of 5120"),
        (lambda d: (d / "shards/rank-0.bin").unlink(), "shards/rank-0.bin cannot be read"),
        (lambda d: (d / MARK).unlink(), "no COMPLETE"),
        (lambda d: (d / MARK).write_text("{"), "COMPLETE is not readable"),
        (lambda d: (d / MARK).write_text("[]"), "COMPLETE is not readable"),
        (lambda d: (d / MARK).write_bytes((directory(d.parent, 20) / MARK).read_bytes()), "that of step 20"),
        (lambda d: (d / MARK).write_text((d / MARK).read_text().replace('"format": 1', '"format": 9')), "format 9"),
    ],
)  # fmt: skip
def test_damage_is_passed_over_with_its_reason(three: Path, damage: object, reason: str) -> None:
    damage(directory(three, 30))  # type: ignore[operator]
    found = find_complete(three)
    assert found is not None and found.step == 20
    assert len(found.skipped) == 1 and found.skipped[0].startswith("step-00000030: ") and reason in found.skipped[0]


def test_published_one_is_never_overwritten_but_a_damaged_one_is_replaced(three: Path) -> None:
    with pytest.raises(PublishError, match="already published"):
        publish(three, 30, fill)
    flip(directory(three, 30) / "state.ckpt")
    publish(three, 30, fill)
    found = find_complete(three)
    assert found is not None and found.step == 30
    assert not list(three.glob(".*"))


def test_prune_keeps_the_last_and_the_named(three: Path) -> None:
    publish(three, 40, fill)
    assert checkpoints.prune(three, keep_last=2, keep=[10]) == [20]
    assert [step for step, _ in published(three)] == [10, 30, 40]


def test_failing_fill_leaves_nothing(three: Path) -> None:
    def broken(folder: Path) -> None:
        fill(folder)
        raise OSError(28, os.strerror(28))

    with pytest.raises(PublishError, match="step 40 was not written.*No space left on device.*intact"):
        publish(three, 40, broken)
    with pytest.raises(KeyError):
        publish(three, 40, lambda _: {}["x"])
    with pytest.raises(ValueError, match="nothing was written"):
        publish(three, 40, lambda _: None)
    assert not [path for path in three.glob(".*") if any(path.iterdir())]
    found = find_complete(three)
    assert found is not None and found.step == 30


def test_space_is_asked_for_first(three: Path) -> None:
    def never(_: Path) -> None:
        pytest.fail("must not be called")

    with pytest.raises(PublishError, match="needs .* MiB, .* free"):
        publish(three, 40, never, needed_bytes=2**60)


def _die_at(folder: Path, call: int) -> None:
    """Publish step 40 and die at the `call`-th system call of writing."""
    count = 0

    def dying(real: object) -> object:
        def counted(*arguments: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)  # type: ignore[operator]

        return counted

    for name in ("mkdir", "fsync", "rename", "replace"):
        setattr(os, name, dying(getattr(os, name)))
    publish(folder, 40, fill)


def test_kill_at_every_point_of_a_save(three: Path) -> None:
    """Whatever is found is whole, the earlier one or the new one, and the next save clears up."""
    context = multiprocessing.get_context("fork")
    ends = []
    for call in range(1, 40):
        process = context.Process(target=_die_at, args=(three, call))
        process.start()
        process.join(30)
        found = find_complete(three)
        assert found is not None and found.step in (30, 40) and found.skipped == []
        ends.append(found.step)
        if found.step == 40:
            checkpoints.shutil.rmtree(found.path)
        if process.exitcode == 0:
            break
    assert process.exitcode == 0 and ends[-1] == 40 and ends.count(30) >= 8, ends
    publish(three, 40, fill)
    assert not list(three.glob(".*"))


def test_the_best_is_the_one_named_and_whole(three: Path) -> None:
    assert find_best(three) is None
    (three / "best").write_text("step-00000020 fidelity=0.5\n")
    found = find_best(three)
    assert found is not None and (found.step, found.path) == (20, directory(three, 20))
    flip(found.path / "state.ckpt")
    assert find_best(three) is None
    (three / "best").write_text("")
    assert find_best(three) is None


def test_what_is_left_of_killed_saves_is_told(three: Path) -> None:
    checkpoints.stage(three, 40)
    flip(directory(three, 20) / "state.ckpt")
    (directory(three, 10) / MARK).unlink()
    assert checkpoints.unfinished(three) == [40]
    assert [reason.partition(":")[0] for reason in checkpoints.damaged(three)] == ["step-00000020", "step-00000010"]


def test_a_clock_that_goes_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the newest nor what is pruned is told from times, those of files or those noted."""

    class Backwards(datetime):
        years = iter(range(2030, 2000, -1))

        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(next(cls.years), 1, 1, tzinfo=tz)

    monkeypatch.setattr(checkpoints, "datetime", Backwards)
    for step in (10, 20, 30):
        path = publish(tmp_path, step, fill)
        for file in (path, *path.rglob("*")):
            os.utime(file, (2e9 - 1e7 * step,) * 2)
    noted = [json.loads((path / MARK).read_text())["time"] for _, path in published(tmp_path)]
    assert noted == sorted(noted, reverse=True) and noted[0].startswith("2030")
    found = find_complete(tmp_path)
    assert found is not None and found.step == 30
    assert checkpoints.prune(tmp_path, keep_last=1) == [10, 20]


def test_what_cannot_be_removed_stays_whole(three: Path) -> None:
    """A folder that turns read-only after a save."""
    for step in (10, 20, 30):
        directory(three, step).chmod(0o555)
    with modes_bind():
        assert checkpoints.prune(three, keep_last=1) == [10, 20]
        assert [find.step for find in (find_complete(three),) if find] == [30] and len(published(three)) == 3
