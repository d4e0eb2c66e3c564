"""An index of caption embeddings, built once: later queries read no shard until pictures are taken from it.

    index/
      embeddings/SHARD.npy    fp16 [N, d], unit vectors in the shard's order
      rows/SHARD.parquet      key, caption, json and place of every picture
      vectors.faiss           inverted lists over all of them (Johnson et al., 2017, arXiv 1702.08734)
      index.json              encoder, shards and counts; written last

Embedding is resumable by shard and can be split over tasks like a scan; `build` merges what is there.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from lit_datamodules.errors import DataError, DataOptionError
from lit_datamodules.retrieval.parts import (
    BINS,
    PICTURE,
    Candidate,
    Part,
    fields_of,
    file_name,
    outdated,
    read_table,
    write_table,
)
from lit_datamodules.retrieval.plan import CaptionEncoder, Plan
from lit_datamodules.retrieval.shard_captions import captioned_batches
from lit_datamodules.shard_access import in_turn
from lit_datamodules.shard_paths import Shard
from lit_datamodules.shard_writer import write_json

log = logging.getLogger(__name__)

TRAINING = 64
"""Vectors per inverted list that place the lists."""
PROBES = 0.1
"""Share of the lists that a search looks into."""


def faiss_module() -> Any:
    """The faiss package.

    Raises:
        DataOptionError: It is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise DataOptionError("an index needs faiss: pip install 'lit-personalize[faiss]'") from error
    return faiss


def embed_shards(
    shards: Mapping[str, Shard], encoder: CaptionEncoder, folder: Path, batch_size: int = 256,
    task: tuple[int, int] = (0, 1), keep: bool = False,
) -> int:  # fmt: skip
    """Embed every `task[1]`-th shard that is not embedded yet, from the `task[0]`-th on; returns how many.

    What is there of another shard that had this name, or of what the shard was before, is replaced.

    Args:
        keep: Shards that are fetched; otherwise each is removed when it was embedded.

    Raises:
        DataError: A shard cannot be read, or the folder belongs to another encoder.
    """
    about = {"encoder": encoder.fingerprint, "batch_size": batch_size}
    note = folder / "encoder.json"
    folder.mkdir(parents=True, exist_ok=True)
    if note.exists() and json.loads(note.read_text(encoding="utf-8")) != about:
        raise DataError(f"{folder} holds embeddings of another encoder or batch size; name another folder")
    write_json(about, note)
    share = {name: shard for i, (name, shard) in enumerate(shards.items()) if i % task[1] == task[0]}
    mine = outdated(share, {name: _rows(folder, name) for name in share})
    with closing(in_turn([shards[name] for name in mine], keep)) as places:
        for done, (name, (version, path)) in enumerate(zip(mine, places, strict=True), start=1):
            part, vectors, rows = Part(name, version), [], []
            for group, tokens in captioned_batches(path, part, batch_size, encoder):
                vectors.append(encoder.embed(tokens).astype(np.float16))
                rows += [row.row for row in group]
            part.scanned = len(rows)
            (folder / "index.json").unlink(missing_ok=True)  # an index of other vectors would name wrong rows
            _save(folder, name, part, np.concatenate(vectors) if vectors else np.zeros((0, 0), np.float16), rows)
            log.info("%s: %d captions embedded (%d of %d)", name, len(rows), done, len(mine))
    return len(mine)


def _rows(folder: Path, shard: str) -> Path:
    return folder / "rows" / file_name(shard, ".parquet")


def _vectors(folder: Path, shard: str) -> Path:
    return folder / "embeddings" / file_name(shard, ".npy")


def _save(folder: Path, shard: str, part: Part, vectors: np.ndarray, rows: list[dict[str, Any]]) -> None:
    """Vectors first, rows last: a shard counts as embedded when its rows are there."""
    path = _vectors(folder, shard)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    np.save(temporary.with_suffix(".npy"), vectors)
    os.replace(temporary.with_suffix(".npy"), path)
    write_table(rows, PICTURE, part, _rows(folder, shard))


def build(shards: Mapping[str, Shard], folder: Path) -> dict[str, Any]:
    """Make the searchable index of all embedded shards; returns what `index.json` says.

    Raises:
        DataError: Shards are not embedded yet, or there is nothing to index.
    """
    faiss = faiss_module()
    if missing := [name for name in shards if not _rows(folder, name).exists()]:
        raise DataError(f"{len(missing)} of {len(shards)} shards are not embedded yet: {', '.join(missing[:5])}")
    loaded = {name: _load_vectors(_vectors(folder, name)) for name in shards}
    counts = {name: len(vectors) for name, vectors in loaded.items()}
    total = sum(counts.values())
    if not total:
        raise DataError(f"{folder} holds no embedding: the shards have no captions")
    width = next(vectors.shape[1] for vectors in loaded.values() if len(vectors))
    lists = max(1, min(int(4 * total**0.5), total // TRAINING))
    index = faiss.index_factory(width, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.train(_sample(loaded, min(total, TRAINING * lists)))
    for vectors in loaded.values():
        if len(vectors):
            index.add(np.asarray(vectors, np.float32))
    temporary = folder / f".tmp-{os.getpid()}.faiss"
    faiss.write_index(index, str(temporary))
    os.replace(temporary, folder / "vectors.faiss")
    about = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    report = {"format": 1, **about, "vectors": total, "width": width, "lists": lists, "shards": counts}
    write_json(report, folder / "index.json")
    return report


def _sample(loaded: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    """`count` vectors drawn from all shards with a fixed seed."""
    places = np.sort(np.random.default_rng(0).choice(sum(map(len, loaded.values())), count, replace=False))
    found, start = [], 0
    for vectors in loaded.values():
        mine = places[(places >= start) & (places < start + len(vectors))] - start
        found.append(np.asarray(vectors[mine], np.float32).reshape(len(mine), -1) if len(mine) else None)
        start += len(vectors)
    return np.concatenate([part for part in found if part is not None])


def search(folder: Path, plan: Plan, queries: np.ndarray, probes: float = PROBES) -> Iterator[Part]:
    """The candidates of a plan as parts, one per shard that has any.

    The index proposes ten times `plan.keep` captions of all shards, which are compared again in full precision of the
    kept embeddings; filters come after that. So what it finds is nearly, and not certainly, what a scan finds.

    Args:
        probes: Share of the inverted lists that are looked into; 1 looks at every vector.

    Raises:
        DataError: There is no finished index, or it is of another encoder.
    """
    path = folder / "index.json"
    if not path.is_file():
        raise DataError(f"{folder} holds no finished index; run `litp data index` to its end")
    about = _about(path)
    if about["encoder"] != plan.encoder:
        raise DataError(f"{folder} was embedded by {about['encoder']}, and not by {plan.encoder}; give that encoder")
    try:
        index = faiss_module().read_index(str(folder / "vectors.faiss"))
        if (index.ntotal, index.d) != (about["vectors"], about["width"]):
            raise RuntimeError(f"it holds {index.ntotal} vectors of {index.d} values, index.json says otherwise")
    except RuntimeError as error:
        raise DataError(f"{folder / 'vectors.faiss'} is damaged ({error}); run `litp data index` again") from error
    index.nprobe = max(1, round(probes * about["lists"]))
    _, found = index.search(np.asarray(queries, np.float32), min(10 * plan.keep, about["vectors"]))
    starts = np.cumsum([0, *about["shards"].values()])
    for number, shard in enumerate(about["shards"]):
        low, high = starts[number], starts[number + 1]
        wanted = [np.sort(ids[(ids >= low) & (ids < high)]) - low for ids in found]
        if any(map(len, wanted)):
            yield _part(folder, shard, plan, queries, wanted)


def _about(path: Path) -> dict[str, Any]:
    """What an `index.json` says.

    Raises:
        DataError: It is none.
    """
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        numbers = [about["vectors"], about["width"], about["lists"], *about["shards"].values()]
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError("a count is no whole number")
        if not (isinstance(about["encoder"], str) and sum(about["shards"].values()) == about["vectors"]):
            raise ValueError("its shards do not add up to its vectors")
        return about
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error!r}); run `litp data index` again") from error


def _load_vectors(path: Path) -> np.ndarray:
    """Embeddings `[N, d]`, read as they are asked for; numbers alone, and no pickled objects.

    Raises:
        DataError: The file is damaged, or holds something else.
    """
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        if vectors.ndim != 2 or vectors.dtype != np.float16:
            raise ValueError(f"it holds {vectors.dtype} {vectors.shape}")
        return vectors
    except (OSError, ValueError, EOFError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} holds no embeddings ({error}); remove it and run `litp data index` again") from error


def _part(folder: Path, shard: str, plan: Plan, queries: np.ndarray, wanted: list[np.ndarray]) -> Part:
    part, table = read_table(_rows(folder, shard))
    vectors = _load_vectors(_vectors(folder, shard))
    columns = {name for name, _ in PICTURE}
    if not columns <= set(table.column_names) or any(len(p) and p[-1] >= min(len(table), len(vectors)) for p in wanted):
        raise DataError(f"{_rows(folder, shard)} is not that of its embeddings; run `litp data index` again")
    for query, column, places in zip(plan.queries, queries, wanted, strict=True):
        part.histograms[query.name] = [0] * BINS  # of what was not compared nothing is known
        values = np.asarray(vectors[places], np.float32) @ column
        found = []
        for row, value in zip(table.take(places).to_pylist(), values, strict=True):
            if plan.filters.asks and (reason := plan.filters.reason(fields_of(row["meta"]) or {})):
                part.dropped[reason] += 1
                continue
            found.append(Candidate.of(shard, row, query.name, float(value)))
        part.candidates += sorted(found, key=lambda c: c.rank)
    return part
