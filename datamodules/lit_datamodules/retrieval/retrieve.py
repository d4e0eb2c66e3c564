"""A whole retrieval: expand the shards, scan those that are missing, merge. Every step can be repeated.

Parts lie in `parts/<plan>/` of the output folder, one per shard. Tasks of an array share that folder and write
different files into it; a task that is stopped goes on with the shards that have no part yet.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from lit_datamodules.errors import DataError, DataOptionError
from lit_datamodules.fetching import PIPE
from lit_datamodules.retrieval import vector_index
from lit_datamodules.retrieval.merge import Selection, merge
from lit_datamodules.retrieval.parts import file_name, outdated, read_part, write_part
from lit_datamodules.retrieval.plan import CaptionEncoder, Plan
from lit_datamodules.retrieval.scan import scan_shard
from lit_datamodules.shard_access import in_turn
from lit_datamodules.shard_paths import Shard, shard_paths
from lit_datamodules.shard_writer import write_json

log = logging.getLogger(__name__)


def find_shards(patterns: Sequence[str], fetch_to: Path | None = None) -> dict[str, Shard]:
    """Shards by name, in the order of their names: the part of the path or URL that is not common to all.

    Args:
        patterns: Paths with braces (`{00000..00331}.tar`) or wildcards (`*.tar`), URLs with braces, or `pipe:COMMAND`.
        fetch_to: Folder for shards that lie elsewhere.

    Raises:
        DataError: A pattern names nothing, or a local shard that does not exist.
        DataOptionError: A pattern is a URL that cannot be opened, or `fetch_to` is missing.
    """
    found = {shard for pattern in patterns for shard in shard_paths(pattern, fetch_to, "--fetch-to")}
    steps = {shard: _steps(shard) for shard in sorted(found, key=str)}
    common = len(os.path.commonprefix([parts[:-1] for parts in steps.values()]))
    return {"/".join(parts[common:]): shard for shard, parts in steps.items()}


def _steps(shard: Shard) -> list[str]:
    """Folders and name; a command is one name."""
    if isinstance(shard, Path):
        return os.path.abspath(shard).split("/")
    return [shard.url] if shard.url.startswith(PIPE) else shard.url.split("/")


def parts_folder(out: Path, plan: Plan) -> Path:
    """Where the parts of a plan lie."""
    return out / "parts" / plan.id


def scan(
    shards: Mapping[str, Shard], plan: Plan, encoder: CaptionEncoder, queries: np.ndarray, out: Path,
    task: tuple[int, int] = (0, 1), keep: bool = False,
) -> int:  # fmt: skip
    """Scan every `task[1]`-th shard that has no part yet, from the `task[0]`-th on; returns how many.

    A part of another shard that had this name, or of what the shard was before, is replaced.

    Args:
        keep: Shards that are fetched; otherwise each is removed when it was scanned.

    Raises:
        DataOptionError: The task's number is not below the number of tasks.
        DataError: See `scan_shard`.
    """
    number, of = task
    if not 0 <= number < of:
        raise DataOptionError(f"task {number} of {of}: tasks are numbered from 0 to {of - 1}")
    folder = parts_folder(out, plan)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "plan.json").exists():
        write_json(plan.to_dict(), folder / "plan.json")
    share = {name: shard for i, (name, shard) in enumerate(shards.items()) if i % of == number}
    mine = outdated(share, {name: part_path(folder, name) for name in share})
    with closing(in_turn([shards[name] for name in mine], keep)) as places:
        for done, (name, (version, path)) in enumerate(zip(mine, places, strict=True), start=1):
            part = scan_shard(path, name, plan, encoder, queries, version)
            write_part(part, part_path(folder, name))
            said = f"{part.scanned} captions of {part.samples} samples"
            said += f", {len(part.faults)} faults" if part.faults else ""
            log.info("%s: %s (%d of %d)", name, said, done, len(mine))
    return len(mine)


def part_path(folder: Path, shard: str) -> Path:
    """Where the part of a shard lies."""
    return folder / file_name(shard, ".parquet")


def merge_parts(shards: Mapping[str, Shard], plan: Plan, selection: Selection, out: Path) -> dict[str, Any]:
    """Merge the parts of all shards into the set in `out`; see `merge`.

    Raises:
        DataError: Shards were not scanned yet; it names them.
    """
    folder = parts_folder(out, plan)
    if missing := [name for name in shards if not part_path(folder, name).exists()]:
        raise DataError(f"{len(missing)} of {len(shards)} shards are not scanned yet: {', '.join(missing[:5])}")
    return merge((read_part(part_path(folder, name)) for name in shards), shards, plan, selection, out)


def merge_index(
    index: Path, shards: Mapping[str, Shard], plan: Plan, queries: np.ndarray, selection: Selection, out: Path,
    probes: float = vector_index.PROBES,
) -> dict[str, Any]:  # fmt: skip
    """Make the set in `out` from an index instead of a scan; see `merge` and `vector_index.search`.

    Raises:
        DataOptionError: A percentile is asked for: the index compares only what is near.
        DataError: The index names shards that are not among `shards`.
    """
    if selection.percentile is not None:
        raise DataOptionError("a percentile needs all similarities: scan without --index, or give --min-similarity")
    parts = list(vector_index.search(index, plan, queries, probes))
    if missing := [part.shard for part in parts if part.shard not in shards]:
        raise DataError(f"the index {index} knows shards that are not given: {', '.join(missing[:5])}; name them all")
    return merge(parts, {part.shard: shards[part.shard] for part in parts}, plan, selection, out)
