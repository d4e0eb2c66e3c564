"""Brings a remote file here whole, or says why not: bounded attempts, growing waits, checks before it counts.

Whatever fsspec knows (`s3://`, `gs://`, `https://`, `hf://` and so on), or the output of a command, `pipe:COMMAND`.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lit_datamodules.errors import DataError, DataOptionError, FetchError
from lit_datamodules.shard_writer import sha256_of_file
from lit_datamodules.tar_index import index_tar

log = logging.getLogger(__name__)

ATTEMPTS = 5
FIRST_WAIT = 1.0
"""Seconds before the second attempt; doubled for each further one, and drawn from half to one and a half of that."""
LONGEST_WAIT = 30.0
CONNECT, SILENCE = 30, 60
"""Seconds after which a web server counts as gone: to connect, and without a byte. A download may take any time."""
PIPE = "pipe:"
TAGS = ("ETag", "etag", "md5Hash", "blob_id", "Content-MD5", "checksum", "LastModified", "last_modified",
        "Last-Modified", "mtime", "created")  # fmt: skip
"""By which file systems say that a file is another one than before; the first that is known counts."""
TRY_LATER = (408, 425, 429)
"""Answers of web servers below 500 that may be others next time."""
LOCAL_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)

Result = TypeVar("Result")


def is_remote(name: str) -> bool:
    """Whether a shard's name is a URL or a command, and no path."""
    return name.startswith(PIPE) or re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name) is not None


def check_scheme(url: str) -> None:
    """Refuse a URL that cannot be opened here, before anything is done.

    Raises:
        DataOptionError: fsspec does not know its scheme, or the scheme's package is not installed.
    """
    if url.startswith(PIPE):
        return
    from fsspec.registry import available_protocols, get_filesystem_class, known_implementations

    scheme = url.partition("://")[0]
    try:
        get_filesystem_class(scheme)
    except ImportError as error:
        place = known_implementations[scheme]
        package = place["class"].partition(".")[0]
        fix = f"pip install {package}" if package != "fsspec" else place.get("err", str(error))
        raise DataOptionError(f"{url} needs a package that is not installed: {fix}") from error
    except ValueError as error:
        close = difflib.get_close_matches(scheme, available_protocols(), 1)
        meant = f"; did you mean {close[0]}://?" if close else "; fsspec.available_protocols() lists what it knows"
        raise DataOptionError(f"{url}: fsspec knows no {scheme}://{meant}") from error


def open_url(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    import fsspec

    options: dict[str, Any] = {}
    scheme = url.partition("://")[0]
    if scheme in ("http", "https"):
        from aiohttp import ClientTimeout  # its own limit of five minutes in all is too short for a shard

        patient = {"timeout": ClientTimeout(total=None, sock_connect=CONNECT, sock_read=SILENCE), "trust_env": True}
        asked = fsspec.config.conf.get("http", {}) | fsspec.config.conf.get("https", {})
        options["client_kwargs"] = patient | asked.get("client_kwargs", {})
    return fsspec.url_to_fs(url, **options)


def about(url: str) -> Mapping[str, Any]:
    """What its file system says of a file; see `version_in`."""
    system, path = open_url(url)
    # A listing or an answer from before may be out of date.
    system.invalidate_cache()
    try:
        found: Mapping[str, Any] = system.info(path)
    except FileNotFoundError as error:
        if url.startswith(("http://", "https://")) and isinstance(error.__cause__, Exception):
            raise error.__cause__ from None  # whatever goes wrong is "not found" there, also a server that is down
        raise
    if found.get("type") == "directory":
        raise IsADirectoryError(errno.EISDIR, "is a folder", url)
    return found


def version_in(url: str, info: Mapping[str, Any]) -> str:
    """What a remote file is: equal as long as its file system says nothing else of it."""
    tag = next((f"{name} {info[name]}" for name in TAGS if info.get(name)), "")
    return hashlib.sha256(f"{url}\n{info.get('size')}\n{tag}".encode()).hexdigest()[:32]


def attempted(work: Callable[[], Result], url: str, stop: threading.Event | None = None) -> Result:
    """Do something with a URL, again after errors that may pass.

    Raises:
        FetchError: It failed for good, or `ATTEMPTS` times.
        OSError: This machine's disk is full or closed.
    """
    stop = stop or threading.Event()
    for number in range(1, ATTEMPTS + 1):
        try:
            return work()
        except (DataOptionError, FetchError):
            raise
        except Exception as error:  # noqa: BLE001 - every file system has its own kinds of errors
            if isinstance(error, OSError) and error.errno in LOCAL_TROUBLE:
                raise
            final, said = is_final(error), reason(error)
            if final or number == ATTEMPTS or stop.is_set():
                tried = f"{number} attempt{'s' * (number > 1)}"
                raise FetchError(f"cannot fetch {url}: {said} ({tried})", final) from error
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (number - 1)) * random.SystemRandom().uniform(0.5, 1.5)
            log.warning("%s: %s; attempt %d of %d follows in %.1f s", url, said, number + 1, ATTEMPTS, wait)
            stop.wait(wait)
    raise ValueError(f"ATTEMPTS must be at least 1, not {ATTEMPTS}")


def is_final(error: Exception) -> bool:
    """Whether another attempt would end the same way."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in TRY_LATER
    return isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError))


def reason(error: Exception) -> str:
    """An error in few words."""
    if isinstance(status := getattr(error, "status", None), int):
        return f"the server answers {status} {getattr(error, 'message', '')}".rstrip()
    if isinstance(error, FileNotFoundError):
        return "not found"
    if isinstance(error, IsADirectoryError):
        return "is a folder"
    return f"{error}" if isinstance(error, DataError) else f"{type(error).__name__}: {error}".removesuffix(": ")


def download(url: str, target: Path, sha256: str = "", stop: threading.Event | None = None, tar: bool = True) -> str:
    """Bring a file here under its name, all or nothing; several processes may do so at once.

    Args:
        sha256: That it must have; "" if that is not known.
        stop: Set by another thread to give up.
        tar: It is a shard: where no length is known, its end tells whether all of it came.

    Returns:
        Its version, see `version_in`.

    Raises:
        FetchError: It could not be fetched, or it always came short or damaged.
        OSError: This machine's disk is full or closed.
    """
    stop = stop or threading.Event()
    target.parent.mkdir(parents=True, exist_ok=True)

    def once() -> str:
        temporary = target.with_name(f".tmp-{uuid.uuid4().hex}")
        info: Mapping[str, Any] = {}
        try:
            if url.startswith(PIPE):
                _run(url.removeprefix(PIPE), temporary, stop)
            else:
                info = about(url)
                system, path = open_url(url)
                system.get_file(path, str(temporary), callback=_stopping(stop))
            _check(temporary, info.get("size"), sha256, tar)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError as error:
            if error.errno in LOCAL_TROUBLE:
                error.filename = str(target)  # a full disk is noticed while writing, where no name is known
            raise
        finally:
            temporary.unlink(missing_ok=True)
        return version_in(url, info)

    begun = time.monotonic()
    version = attempted(once, url, stop)
    log.info("fetched %s: %s in %.1f s", url, in_words(target.stat().st_size), time.monotonic() - begun)
    return version


def in_words(size: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _stopping(stop: threading.Event) -> Any:
    from fsspec.callbacks import Callback

    class Stopping(Callback):
        def call(self, *args: Any, **kwargs: Any) -> None:
            if stop.is_set():
                raise DataError("stopped")

    return Stopping()


def _run(command: str, target: Path, stop: threading.Event) -> None:
    """Write a command's output to a file; a failure anywhere in a chain of commands is one."""
    bash = shutil.which("bash")
    shell = [bash, "-o", "pipefail", "-c"] if bash else ["sh", "-c"]
    with target.open("wb") as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [*shell, command], stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True
        )
        try:
            while process.poll() is None and not stop.wait(0.02):
                pass
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        errors.seek(0)
        said = errors.read()[-2000:].decode("utf-8", "replace").strip().splitlines()
    if process.returncode:
        raise DataError(f"the command ended with {process.returncode}{f': {said[-1]}' if said else ''}")


def _check(path: Path, size: int | None, sha256: str, tar: bool) -> None:
    came = path.stat().st_size
    if size is not None and came != size:
        raise DataError(f"{came} of {size} bytes came")
    if sha256:
        if sha256_of_file(path) != sha256:
            raise DataError("what came is damaged: its sha256 is not the one in shards.json")
    elif size is None and tar and (short := index_tar(path).short):
        raise DataError(f"what came {short}")
