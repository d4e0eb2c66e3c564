"""One shard in, its best candidates per query out.

A shard is the unit of a scan: its captions are embedded in batches that never reach into the next one, so what it
gives depends on the shard and the plan alone, and not on which task of an array scans it, nor beside which others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lit_datamodules.errors import DataError
from lit_datamodules.retrieval.parts import BINS, Candidate, Part
from lit_datamodules.retrieval.plan import CaptionEncoder, Plan
from lit_datamodules.retrieval.shard_captions import Captioned, captioned_batches


def scan_shard(
    path: Path, name: str, plan: Plan, encoder: CaptionEncoder, queries: np.ndarray, version: str = ""
) -> Part:
    """Embed the captions of a shard and keep the best of each query.

    Args:
        name: By which the shard is known in the result.
        queries: fp32 `[len(plan.queries), d]`, unit vectors in the encoder's space.
        version: Of the shard, for the record.

    Raises:
        DataError: The file cannot be read at all, or the encoder gave vectors of another width.
    """
    part = Part(name, version)
    rows: list[Captioned] = []
    scores: list[np.ndarray] = []
    for group, tokens in captioned_batches(path, part, plan.batch_size, encoder, plan.filters):
        vectors = encoder.embed(tokens)
        if vectors.shape != (len(group), queries.shape[1]):
            raise DataError(f"the encoder gave {vectors.shape} for {len(group)} captions of {queries.shape[1]}")
        rows += group
        scores.append(vectors @ queries.T)
    part.scanned = len(rows)
    found = np.concatenate(scores) if scores else np.zeros((0, len(plan.queries)), np.float32)
    for column, query in enumerate(plan.queries):
        values = found[:, column].astype(np.float64)
        part.histograms[query.name] = np.histogram(values.clip(-1, 1), BINS, (-1, 1))[0].tolist()
        made = [Candidate.of(name, rows[i].row, query.name, float(values[i])) for i in _largest(values, plan.keep)]
        part.candidates += sorted(made, key=lambda c: c.rank)[: plan.keep]
    return part


def _largest(values: np.ndarray, keep: int) -> Sequence[int]:
    """Places of the `keep` largest values, and of all that equal the least of them."""
    if len(values) <= keep:
        return range(len(values))
    least = np.partition(values, len(values) - keep)[len(values) - keep]
    return np.flatnonzero(values >= least).tolist()
