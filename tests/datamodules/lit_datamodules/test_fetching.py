"""A file comes whole or not at all: trouble that passes is waited for, and trouble that stays is told."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lit_datamodules import fetching
from lit_datamodules.errors import DataOptionError, FetchError
from lit_datamodules.fetching import about, attempted, download, is_remote, version_in

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def quick(hasty: None) -> None:
    pass


def content(path: Path, size: int = 3_000_000) -> bytes:
    data = os.urandom(size)
    path.write_bytes(data)
    return data


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("trouble", [["503", "503"], ["429"], ["cut", "cut"], ["cut", "503", "cut"]])
def test_trouble_that_passes_is_waited_for(
    web: Any, tmp_path: Path, trouble: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = content(tmp_path / "a.tar")
    web.trouble["a.tar"] = list(trouble)
    download(f"{web.url}/a.tar", tmp_path / "here/a.tar")
    assert (tmp_path / "here/a.tar").read_bytes() == data and left(tmp_path / "here") == ["a.tar"]
    assert web.got("a.tar") == len(trouble) + 1
    assert f"attempt {len(trouble) + 1} of 5 follows" in caplog.text


def test_giving_up_tells_url_attempts_and_the_last_error(web: Any, tmp_path: Path) -> None:
    content(tmp_path / "a.tar")
    for trouble, said in (("503", "the server answers 503 Service Unavailable"), ("cut", "ClientPayloadError")):
        web.trouble["a.tar"], web.asked[:] = [trouble] * 9, []
        with pytest.raises(FetchError, match=rf"cannot fetch {web.url}/a\.tar: {said}.*\(5 attempts\)") as stop:
            download(f"{web.url}/a.tar", tmp_path / "here/a.tar")
        assert web.got("a.tar") == 5 and not stop.value.final
        assert left(tmp_path / "here") == []


class Lossy(MemoryFileSystem):
    """Gives half of a file, and says nothing of it."""

    protocol = "lossy"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("lossy://"))

    def get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        Path(lpath).write_bytes(self.cat_file(rpath)[:500])


def test_a_file_of_another_length_than_stated_does_not_count(tmp_path: Path) -> None:
    fsspec.register_implementation("lossy", Lossy, clobber=True)
    fsspec.filesystem("lossy").pipe("/a.tar", bytes(1000))
    with pytest.raises(FetchError, match=r"lossy://a\.tar: 500 of 1000 bytes came \(5 attempts\)"):
        download("lossy://a.tar", tmp_path / "here/a.tar")
    assert left(tmp_path / "here") == []


def test_what_is_not_there_is_asked_for_once(web: Any, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"none\.tar: the server answers 404 Not Found \(1 attempt\)") as stop:
        download(f"{web.url}/none.tar", tmp_path / "here/a.tar")
    assert stop.value.final
    with pytest.raises(FetchError, match=r"memory://none\.tar: not found \(1 attempt\)"):
        download("memory://none.tar", tmp_path / "here/a.tar")
    with pytest.raises(FetchError, match=r"is a folder \(1 attempt\)"):
        download(f"file://{tmp_path}", tmp_path / "here/a.tar")


def test_a_server_that_is_down_may_come_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """fsspec calls that "not found", too."""
    with pytest.raises(FetchError, match=r"ClientConnectorError: .*Connect.* \(5 attempts\)") as stop:
        download("http://127.0.0.1:1/a.tar", tmp_path / "here/a.tar")
    assert not stop.value.final


def test_waits_grow_to_a_limit(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    waits: list[float] = []
    stop = threading.Event()
    monkeypatch.setattr(stop, "wait", waits.append)
    for name, value in (("FIRST_WAIT", 1.0), ("LONGEST_WAIT", 6.0), ("ATTEMPTS", 6)):
        monkeypatch.setattr(fetching, name, value)

    def fail() -> None:
        raise TimeoutError

    with pytest.raises(FetchError, match=r"cannot fetch u: TimeoutError \(6 attempts\)"):
        attempted(fail, "u", stop)
    for wait, middle in zip(waits, (1, 2, 4, 6, 6), strict=True):
        assert 0.5 * middle <= wait <= 1.5 * middle
    assert len({wait / middle for wait, middle in zip(waits, (1, 2, 4, 6, 6), strict=True)}) == 5, "drawn anew"


def test_a_full_disk_is_no_trouble_of_the_server(tmp_path: Path) -> None:
    calls = []

    def full() -> None:
        calls.append(1)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        attempted(full, "u")
    assert len(calls) == 1


def test_a_hash_that_is_known_must_be_met(web: Any, tmp_path: Path) -> None:
    data = content(tmp_path / "a.tar")
    download(f"{web.url}/a.tar", tmp_path / "here/a.tar", hashlib.sha256(data).hexdigest())
    with pytest.raises(FetchError, match=r"its sha256 is not the one in shards\.json \(5 attempts\)"):
        download(f"{web.url}/a.tar", tmp_path / "here/b.tar", hashlib.sha256(b"other").hexdigest())
    assert left(tmp_path / "here") == ["a.tar"]


def test_a_command_gives_its_output(shards: Write, tmp_path: Path) -> None:
    path = shards() / "00000.tar"
    download(f"pipe:cat {path} | cat", tmp_path / "here/a.tar")
    assert (tmp_path / "here/a.tar").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("cat {path}; exit 7", "the command ended with 7"),
        ("echo no such bucket >&2; exit 1", "the command ended with 1: no such bucket"),
        ("cat {path}; false | cat", "the command ended with 1"),
        ("head -c 9000 {path}", "what came is cut off"),
        ("true", "what came is empty"),
        ("none-such-command", "ended with 127: .*not found"),
    ],
)
def test_a_failed_command_is_no_short_shard(shards: Write, tmp_path: Path, command: str, said: str) -> None:
    path = shards() / "00000.tar"
    with pytest.raises(FetchError, match=rf"{said}.* \(5 attempts\)"):
        download(f"pipe:{command.format(path=path)}", tmp_path / "here/a.tar")
    assert left(tmp_path / "here") == []


def test_a_command_that_comes_right(shards: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It fails twice, the first time after half of its output."""
    path, count = shards() / "00000.tar", tmp_path / "count"
    script = tmp_path / "flaky.sh"
    script.write_text(
        f"echo >> {count}\n[ $(wc -l < {count}) -gt 2 ] && exec cat {path}\nhead -c 9000 {path}; exit 3\n"
    )
    download(f"pipe:sh {script}", tmp_path / "here/a.tar")
    assert (tmp_path / "here/a.tar").read_bytes() == path.read_bytes()
    assert caplog.text.count("ended with 3") == 2


def test_stopping_ends_a_command_and_a_download_soon(web: Any, tmp_path: Path) -> None:
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    begun = time.monotonic()
    with pytest.raises(FetchError, match=r"\(1 attempt\)"):
        download("pipe:sleep 60", tmp_path / "here/a.tar", stop=stop)
    content(tmp_path / "a.tar")
    with pytest.raises(FetchError, match=r"stopped \(1 attempt\)"):
        download(f"{web.url}/a.tar", tmp_path / "here/a.tar", stop=stop)
    assert time.monotonic() - begun < 20 and left(tmp_path / "here") == []


def _fetch(url: str, target: str, go: Any) -> None:
    go.wait()
    for _ in range(5):
        download(url, Path(target))


def test_processes_may_fetch_the_same_at_once(web: Any, tmp_path: Path) -> None:
    data = content(tmp_path / "a.tar")
    context = multiprocessing.get_context("spawn")
    go, target = context.Event(), tmp_path / "here/a.tar"
    processes = [context.Process(target=_fetch, args=(f"{web.url}/a.tar", str(target), go)) for _ in range(2)]
    for process in processes:
        process.start()
    go.set()
    sizes = set()
    while any(process.is_alive() for process in processes):
        if target.is_file():
            sizes.add(target.stat().st_size)
        time.sleep(0.002)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert sizes <= {len(data)}, "never seen in part"
    assert target.read_bytes() == data and left(tmp_path / "here") == ["a.tar"]


def test_a_version_changes_with_the_file(web: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    content(tmp_path / "a.tar", 1000)
    url = f"{web.url}/a.tar"
    first = download(url, tmp_path / "here/a.tar")
    assert "fetched" in caplog.text and "1 kB" in caplog.text
    assert first == version_in(url, about(url))
    content(tmp_path / "a.tar", 1000)
    assert first != version_in(url, about(url)), "as long as before"


@pytest.mark.parametrize(
    ("name", "remote"),
    [
        ("s3://b/0.tar", True), ("hf://datasets/a/b/0.tar", True), ("pipe:cat 0.tar", True), ("reg/0.tar", False),
        ("C:/0.tar", False), ("pipes/0.tar", False), ("/a:b/0.tar", False),
    ],
)  # fmt: skip
def test_what_lies_elsewhere(name: str, remote: bool) -> None:
    assert is_remote(name) is remote


def test_schemes_are_checked_before_anything_is_done() -> None:
    fetching.check_scheme("https://host/0.tar")
    with pytest.raises(DataOptionError, match=r"htps://a: fsspec knows no htps://; did you mean https://\?"):
        fetching.check_scheme("htps://a")
    fsspec.register_implementation("absent", "absentfs.AbsentFileSystem", clobber=True, errtxt="Install absentfs")
    with pytest.raises(DataOptionError, match="not installed: pip install absentfs"):
        fetching.check_scheme("absent://a")
