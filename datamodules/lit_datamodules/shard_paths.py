"""Which shards a pattern names: files here, or files elsewhere that are fetched when they are needed."""

from __future__ import annotations

import glob
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from lit_datamodules.errors import DataError, DataOptionError
from lit_datamodules.fetching import PIPE, check_scheme, is_remote


@dataclass(frozen=True)
class RemoteShard:
    """A shard elsewhere.

    Args:
        url: As it was written: by it the shard is known, wherever it is fetched to.
        folder: That keeps what is fetched.
    """

    url: str
    folder: Path

    def __str__(self) -> str:
        return self.url

    @property
    def path(self) -> Path:
        """Where it lies when it is kept."""
        return self.path_in(self.folder)

    def path_in(self, folder: Path) -> Path:
        """Where it lies in a folder; shards of one remote folder lie together, under their names."""
        if self.manifest_url is None:
            return folder / f"{_hash(self.url)}.tar"
        parent, _, name = self.url.rpartition("/")
        readable = re.sub(r"[^A-Za-z0-9]+", "-", parent)[-60:].strip("-")
        return folder / f"{readable}-{_hash(parent)}" / quote(name, safe=" ")

    @property
    def manifest_url(self) -> str | None:
        """Where the notes on it and its neighbours would lie; None where nothing lies beside it."""
        if self.url.startswith(PIPE) or "?" in self.url:
            return None
        return f"{self.url.rpartition('/')[0]}/shards.json"


Shard = Path | RemoteShard


def shard_paths(pattern: str, fetch_to: Path | None = None, option: str = "fetch_to") -> list[Shard]:
    """Shards that a pattern with braces (`{00000..00331}.tar`) or wildcards (`*.tar`) names, in its order.

    A pattern may be a URL whose scheme fsspec knows, or `pipe:COMMAND`; braces expand there, too.

    Args:
        fetch_to: Folder for what is fetched.
        option: How the user gives that folder.

    Raises:
        DataError: It names nothing, or local shards that are missing; it names those.
        DataOptionError: It is a URL, and there is no `fetch_to`, or the URL cannot be opened here.
    """
    from braceexpand import braceexpand

    try:
        found = list(braceexpand(pattern, escape=not pattern.startswith(PIPE)))
    except ValueError as error:
        raise DataOptionError(f"shards {pattern}: {error}; write a range as {{00000..00331}}") from error
    if is_remote(pattern):
        return [_remote(url, fetch_to, option) for url in found]
    if len(found) == 1 and glob.has_magic(pattern):
        found = sorted(glob.glob(pattern))
    if not found:
        raise DataError(f"no shard is called {pattern}")
    paths = [Path(url) for url in found]
    if missing := [str(p) for p in paths if not p.is_file()]:
        raise DataError(f"shards are missing: {', '.join(missing[:5])} ({len(missing)} of {len(paths)})")
    return list(paths)


def _remote(url: str, fetch_to: Path | None, option: str) -> RemoteShard:
    check_scheme(url)
    if fetch_to is None:
        raise unasked(url, option)
    if not url.startswith(PIPE) and ("*" in url or not url.rpartition("/")[2]):
        raise DataOptionError(f"{url} names no file; write URLs with a range, such as {{00000..00331}}.tar")
    return RemoteShard(url, fetch_to)


def unasked(url: str, option: str) -> DataOptionError:
    """That something lies elsewhere, and no folder was named for it."""
    return DataOptionError(f"{url} lies elsewhere and is fetched only when asked: name a folder for that by {option}")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
