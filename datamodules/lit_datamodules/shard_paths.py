"""Which shards a pattern names."""

from __future__ import annotations

import glob
from pathlib import Path

from lit_datamodules.errors import DataError


def shard_paths(pattern: str) -> list[Path]:
    """Shards that a pattern with braces (`{00000..00331}.tar`) or wildcards (`*.tar`) names, in its order.

    Raises:
        DataError: It names nothing, or shards that are missing; it names those.
    """
    from webdataset.shardlists import expand_urls

    found = expand_urls(pattern)
    if len(found) == 1 and glob.has_magic(pattern):
        found = sorted(glob.glob(pattern))
    if not found:
        raise DataError(f"no shard is called {pattern}")
    paths = [Path(url) for url in found]
    if missing := [str(p) for p in paths if not p.is_file()]:
        raise DataError(f"shards are missing: {', '.join(missing[:5])} ({len(missing)} of {len(paths)})")
    return paths
