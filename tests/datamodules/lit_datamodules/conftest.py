"""Rendered pictures as a user's folders and shards, a tiny base for the session, and a web server with moods."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random base with 32x32 pictures and 2 pixels per latent cell."""
    from lit_personalize.backbones.loading import load_base
    from lit_personalize.backbones.tiny import write_tiny_base

    return load_base(str(write_tiny_base(tmp_path_factory.mktemp("base"))))


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Write `count` rendered pictures with their captions into a new folder."""

    def write(name: str = "photos", count: int = 5, seed: int = 0, captions: bool = False, size: int = 64) -> Path:
        from lit_personalize.tinyworld.dataset import sample_pictures, write_folder

        path = tmp_path / name
        write_folder(sample_pictures(count, seed, size=size), path)
        for sidecar in [*path.glob("*.json"), *([] if captions else path.glob("*.txt"))]:
            sidecar.unlink()
        return path

    return write


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., Path]:
    """Write `count` rendered pictures as shards of five."""

    def write(count: int = 8, seed: int = 7) -> Path:
        from lit_personalize.tinyworld.dataset import sample_pictures, write_shards

        write_shards(sample_pictures(count, seed), tmp_path / "shards", per_shard=5)
        return tmp_path / "shards"

    return write


class WebServer(ThreadingHTTPServer):
    """A web server over a folder that misbehaves as it is told.

    Args:
        folder: That it serves.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.parts = True
        """Whether it gives parts of files."""
        self.trouble: dict[str, list[str]] = {}
        """For GET requests of a file's name, in turn: "503", "429" or "cut"."""
        self.asked: list[tuple[str, str, str]] = []
        """Method, file name and range of every request."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def got(self, name: str) -> int:
        """How often a whole file was asked for."""
        return sum(asked == ("GET", name, "") for asked in self.asked)


class Answer(BaseHTTPRequestHandler):
    server: WebServer

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        span = self.headers.get("Range", "")
        self.server.asked.append((self.command, name, span))
        waiting = self.server.trouble.get(name, [])
        trouble = waiting.pop(0) if waiting and self.command == "GET" else ""
        path = self.server.folder / self.path.lstrip("/")
        if trouble.isdigit() or not path.is_file():
            self.send_error(int(trouble or 404))
            return
        data = path.read_bytes()
        self.send_response(206 if span and self.server.parts else 200)
        if span and self.server.parts:
            first, last = span.removeprefix("bytes=").split("-")
            data = data[int(first) : int(last) + 1]
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", hashlib.sha256(path.read_bytes()).hexdigest())
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2] if trouble == "cut" else data)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    """A web server over `tmp_path`."""
    server = WebServer(tmp_path)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow at once."""
    monkeypatch.setattr("lit_datamodules.fetching.FIRST_WAIT", 0.001)
