"""Adapters in files become rows of a corpus; what is packed already is left out, so the same call continues."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_personalize.backbones.base import Base
from lit_personalize.corpus import w2w_files
from lit_personalize.corpus.labels import read_labels
from lit_personalize.corpus.layout import Layout
from lit_personalize.corpus.sources import Found, adapters_in
from lit_personalize.corpus.store import MANIFEST, Corpus
from lit_personalize.errors import DataError

log = logging.getLogger(__name__)


@dataclass
class Packed:
    """What became of the adapters."""

    corpus: str
    rows: int
    """Of the corpus, now."""
    width: int
    """D."""
    gauge: str
    packed: int
    known: int
    """In the corpus before."""
    largest_error: float
    """Relative, of a factor that was packed now, by rounding to the corpus's dtype."""
    labels: dict[str, int] = field(default_factory=dict)
    """How many adapters of the corpus have each."""
    unknown_ids: list[str] = field(default_factory=list)
    """That were given labels, and are not in the corpus."""
    fingerprint: str = ""


def pack(
    source: Path,
    folder: Path,
    base: Base,
    labels: Path | None = None,
    dtype: str = "float16",
    gauge: str | None = None,
    init_seed: int | None = None,
    alpha: float | None = None,
    shard_rows: int = 512,
) -> Packed:
    """Add the adapters in a folder to the corpus in `folder`, which is made if it is not there.

    Args:
        source: What `litp bank run` wrote; or files and PEFT folders, each an adapter; or Weights2Weights' layout.
        labels: See `read_labels`.
        dtype: Of a new corpus.
        gauge: Of a new corpus: "unknown" takes adapters whose A did not begin alike, or of which that is not known.
        init_seed: Of adapters that do not say it: the seed from which the A of all of them began.
        alpha: Of Weights2Weights' rows without an `adapter_config.json`.

    Raises:
        DataError: An adapter of another base, layers, rank, alpha or initial seed; or one that cannot be read.
        RunLockedError: Another process is writing.
    """
    told = read_labels(labels) if labels else {}
    foreign = w2w_files.is_w2w(source)
    found = w2w_files.rows_in(source, base, list(told), alpha) if foreign else adapters_in(source, base)
    if not (folder / MANIFEST).is_file():
        first = next(found, None)
        if first is None:
            raise DataError(
                f"{source} holds no adapter: name a folder of litp bank run, one of adapter files, or one in the "
                "layout of Weights2Weights (all_weights.pt)"
            )
        found = chain([first], found)
        begun = None if gauge == "unknown" else _seed_of(first, init_seed)
        Corpus.create(
            folder, _read(first, base)[0], base_fingerprint=base.fingerprint, init_seed=begun, dtype=dtype,
            base=base.source, recipe=str(first.record.get("recipe") or ""), shard_rows=shard_rows,
        )  # fmt: skip
    corpus = Corpus.open(folder)
    with corpus.writing():
        _refuse_corpus(corpus, base, gauge)
        report = Packed(str(folder), 0, corpus.width, corpus.gauge, 0, len(corpus), 0.0)
        known = set(corpus.ids)
        fresh = (one for one in found if one.id not in known)
        while batch := list(islice(fresh, corpus.shard_rows)):
            rows = torch.stack([_row(one, corpus, base, init_seed) for one in batch])
            corpus.append(rows, [_record(one, told, init_seed) for one in batch])
            report.packed += len(batch)
            report.largest_error = max(report.largest_error, *corpus.index["error"].to_pylist()[-len(batch) :])
            log.info("%d adapters packed, %d were before", report.packed, report.known)
        if known & set(told):
            corpus.set_labels({name: own for name, own in told.items() if name in known})
    report.rows, report.labels, report.fingerprint = len(corpus), corpus.label_counts(), corpus.fingerprint
    report.unknown_ids = sorted(set(told) - set(corpus.ids))
    return report


def _read(one: Found, base: Base) -> tuple[Layout, Tensor]:
    own = one.record.get("base_fingerprint", base.fingerprint)
    if own != base.fingerprint:
        raise DataError(
            f"adapter {one.id!r} was trained on base {own}, this is {base.source} ({base.fingerprint}): "
            "name its base with --base, or leave it out"
        )
    return one.read()


def _row(one: Found, corpus: Corpus, base: Base, init_seed: int | None) -> Tensor:
    """An adapter's row `[D]`, if it belongs into the corpus.

    Raises:
        DataError: It does not.
    """
    layout, row = _read(one, base)
    if layout != corpus.layout:
        raise DataError(
            f"adapter {one.id!r} {corpus.layout.difference(layout)} as in {corpus.folder}: leave it out, or pack it "
            "into another corpus"
        )
    if corpus.gauge == "known" and (begun := _seed_of(one, init_seed)) != corpus.init_seed:
        raise DataError(
            f"adapter {one.id!r} began from initial seed {begun}, those in {corpus.folder} from {corpus.init_seed}: "
            "their numbers cannot be compared; train it again with that --init-seed, or pack all of them into another "
            "corpus with --gauge unknown"
        )
    return row


def _seed_of(one: Found, init_seed: int | None) -> int:
    begun = one.record.get("init_seed", init_seed)
    if begun is None:
        raise DataError(
            f"adapter {one.id!r} does not say from which seed its A began, and numbers of adapters that began "
            "differently cannot be compared: give --gauge unknown, or --init-seed N if all of them began from one"
        )
    return int(begun)


def _record(one: Found, told: Mapping[str, Mapping[str, Any]], init_seed: int | None) -> dict[str, Any]:
    labels = {**(one.record.get("labels") or {}), **told.get(one.id, {})}
    return {"init_seed": init_seed, **one.record, "id": one.id, "labels": labels}


def _refuse_corpus(corpus: Corpus, base: Base, gauge: str | None) -> None:
    if corpus.base_fingerprint != base.fingerprint:
        raise DataError(
            f"{corpus.folder} holds adapters of base {corpus.base_fingerprint}, this is {base.source} "
            f"({base.fingerprint}): name that base, or another corpus"
        )
    if gauge not in (None, corpus.gauge):
        raise DataError(f"{corpus.folder} was made with gauge {corpus.gauge}: name another corpus for gauge {gauge}")
