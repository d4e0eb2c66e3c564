"""Shards wherever they lie: fetched when they are needed, read in part where that is enough, told apart by version."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Generator, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from lit_datamodules.errors import DataError, FetchError
from lit_datamodules.fetching import PIPE, about, attempted, download, in_words, open_url, version_in
from lit_datamodules.shard_paths import RemoteShard, Shard
from lit_datamodules.shard_writer import MANIFEST, stated
from lit_datamodules.tar_index import Member, read_member

log = logging.getLogger(__name__)

SAMPLES, SAMPLE = 16, 4096
"""Pieces of a local shard, and the bytes of each, that tell it from another one."""
AT_ONCE = 8
"""Questions, and AT_ONCE / 2 downloads, that are under way together."""

Name = TypeVar("Name", bound=Hashable)


def version_of(shard: Shard) -> str:
    """Tells a shard from another one of its name: by its length and 64 KiB spread over it, wherever it lies here.

    Of a remote shard, by its URL and what the file system says of it; of a pipe, by its command alone.

    Raises:
        DataError: It cannot be read, or (FetchError) asked for.
    """
    if isinstance(shard, RemoteShard):
        pipe = shard.url.startswith(PIPE)
        return version_in(shard.url, {} if pipe else attempted(lambda: about(shard.url), shard.url))
    try:
        with shard.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            places = [max(0, size - SAMPLE) * i // (SAMPLES - 1) for i in range(SAMPLES)]
            pieces = [os.pread(file.fileno(), SAMPLE, place) for place in places]
    except OSError as error:
        raise DataError(f"cannot read shard {shard}: {error.strerror}") from error
    return hashlib.sha256(b"".join([b"%d\n" % size, *pieces])).hexdigest()[:32]


def versions_of(shards: Mapping[Name, Shard]) -> dict[Name, str]:
    """The version of every shard; see `version_of`."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(shards, pool.map(version_of, shards.values()), strict=True))


class Fetcher:
    """Fetches shards, with the `shards.json` beside them, against which they are checked.

    Args:
        stop: Set by another thread to give up.
    """

    def __init__(self, stop: threading.Event | None = None):
        self.stop = stop or threading.Event()
        self._noted: set[Path] = set()
        self._lock = threading.Lock()

    def fetch(self, shard: RemoteShard, folder: Path) -> Path:
        """Bring a shard into a folder, and note its version beside it; see `fetching.download`."""
        target = shard.path_in(folder)
        with self._lock:
            if shard.manifest_url and target.parent not in self._noted:
                try:
                    download(shard.manifest_url, target.with_name(MANIFEST), stop=self.stop, tar=False)
                except FetchError as error:
                    if not error.final:
                        raise
                self._noted.add(target.parent)
        said = (stated(target) or {}).get("sha256", "")
        _note(target).unlink(missing_ok=True)
        version = download(shard.url, target, said, self.stop)
        temporary = target.with_name(f".tmp-{os.getpid()}-{threading.get_ident()}-{target.name}")
        temporary.write_text(version)
        os.replace(temporary, _note(target))
        return target


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.version")


def kept_copy(shard: RemoteShard, version: str) -> Path | None:
    """A copy of this version that was kept, if there is one."""
    try:
        noted = _note(shard.path).read_text()
    except FileNotFoundError:  # never fetched, or another process is fetching it again
        return None
    return shard.path if noted == version and shard.path.is_file() else None


def fetch_all(shards: Sequence[Shard]) -> dict[str, str]:
    """Fetch and keep every remote shard that is not here yet; what is here is used as it is, and nothing is asked.

    Returns:
        By URL, why a shard could not be fetched.

    Raises:
        DataError: There is not enough room.
    """
    missing = [shard for shard in shards if isinstance(shard, RemoteShard) and not shard.path.is_file()]
    if not missing:
        return {}
    folder = missing[0].folder
    folder.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    with _workers(AT_ONCE // 2) as (pool, stop):
        fetcher = Fetcher(stop)
        total = _total(missing, pool)
        size = "of unknown size" if total is None else in_words(total)
        log.info(
            "fetching shards that are not here yet: %d (%s) into %s, where they are kept", len(missing), size, folder
        )
        if total is not None and total > (free := shutil.disk_usage(folder).free):
            raise DataError(f"{folder} has room for {in_words(free)}, the shards have {in_words(total)}; name another")
        for shard, work in [(shard, pool.submit(fetcher.fetch, shard, folder)) for shard in missing]:
            try:
                work.result()
            except FetchError as error:
                failed[shard.url] = str(error)
    return failed


def on_any_rank(failed: dict[str, str]) -> dict[str, str]:
    """What failed on one rank of a training counts as failed on all: they must agree on what there is to show."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return failed
    found: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, failed)
    return {url: why for one in found for url, why in one.items()}


def _total(shards: Sequence[RemoteShard], pool: ThreadPoolExecutor) -> int | None:
    """Bytes of remote shards; None where they are not all known."""

    def size(shard: RemoteShard) -> int | None:
        if shard.url.startswith(PIPE):
            return None
        try:
            return about(shard.url).get("size")
        except Exception:  # noqa: BLE001 - fetching it meets the same error, and tells it
            return None

    sizes = list(pool.map(size, shards))
    return None if None in sizes else sum(filter(None, sizes))


@contextmanager
def _workers(count: int) -> Iterator[tuple[ThreadPoolExecutor, threading.Event]]:
    """Threads that stop at once when what they work for has ended."""
    stop = threading.Event()
    with ThreadPoolExecutor(count) as pool:
        try:
            yield pool, stop
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


def in_turn(shards: Sequence[Shard], keep: bool = False) -> Generator[tuple[str, Path]]:
    """Version and place of one shard after the other; the next is fetched while one is used.

    Args:
        keep: What is fetched; otherwise it lies in a folder of this process, and is removed after its turn.
    """
    with ExitStack() as stack:
        own: Path | None = None
        if not keep and (remote := next((shard for shard in shards if isinstance(shard, RemoteShard)), None)):
            own = _own_folder(remote, stack)
        pool, stop = stack.enter_context(_workers(1))
        fetcher = Fetcher(stop)

        def bring(shard: Shard) -> tuple[str, Path]:
            version = version_of(shard)
            if isinstance(shard, Path):
                return version, shard
            return version, kept_copy(shard, version) or fetcher.fetch(shard, own or shard.folder)

        waiting = [pool.submit(bring, shard) for shard in shards[:1]]
        for following in [*shards[1:], None]:
            if not waiting:
                return
            version, path = waiting.pop().result()
            if following is not None:
                waiting.append(pool.submit(bring, following))
            yield version, path
            if own is not None and path.is_relative_to(own):
                path.unlink()


def _own_folder(shard: RemoteShard, stack: ExitStack) -> Path:
    shard.folder.mkdir(parents=True, exist_ok=True)
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="passing-", dir=shard.folder)))


class MemberReader:
    """Reads single files of shards; of remote ones only their bytes, where the server can give a part of a file.

    A context manager: what had to be fetched whole is removed at its end.

    Args:
        versions: Of the shards that are read.
    """

    def __init__(self, versions: Mapping[Shard, str]):
        self.versions = versions
        self._stack = ExitStack()
        self._whole: dict[RemoteShard, Path] = {}
        self._no_parts: set[str] = set()
        """Remote folders whose server gives no parts of files."""
        self._own: Path | None = None
        self._fetcher = Fetcher()

    def __enter__(self) -> MemberReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, shard: Shard, member: Member) -> bytes:
        """The bytes of a file of a shard.

        Raises:
            FetchError: They cannot be fetched.
        """
        if isinstance(shard, Path):
            return read_member(shard, member)
        path = self._whole.get(shard) or kept_copy(shard, self.versions[shard])
        if path is None:
            folder = shard.url.rpartition("/")[0]
            if not shard.url.startswith(PIPE) and folder not in self._no_parts:
                data = attempted(lambda: _range(shard.url, member), shard.url)
                if data is not None:
                    return data
                self._no_parts.add(folder)
            self._own = self._own or _own_folder(shard, self._stack)
            path = self._whole[shard] = self._fetcher.fetch(shard, self._own)
        return read_member(path, member)


def _range(url: str, member: Member) -> bytes | None:
    """A part of a remote file; None if its server gives no parts."""
    system, path = open_url(url)
    data: bytes = system.cat_file(path, start=member.offset, end=member.offset + member.size)
    if len(data) < member.size:
        raise DataError(f"{len(data)} of {member.size} bytes came")
    return data if len(data) == member.size else None
