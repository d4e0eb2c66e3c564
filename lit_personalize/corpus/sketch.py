"""Rows that do not depend on how ΔW is split into factors, for a corpus whose adapters did not begin alike.

(A, B) and (cA, B/c), or any (QA, BQ⁻¹), are one ΔW = s·B·A but different numbers, so numbers of a corpus of unknown
gauge cannot be compared. A sketch of ΔW can: m numbers per layer, s·uᵀ(BA)v / √m with m pairs of Gaussian vectors u, v
that all adapters share. It is linear in ΔW, keeps norms and inner products in expectation, and ΔW is never formed.
Pairs keep them better than m = p² numbers of a two-sided sketch U·ΔW·V: of a ΔW of rank 1 a relative variance of 8/m
against 4/√m.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lit_personalize.corpus.store import Corpus


class Sketched:
    """A corpus's adapters as sketches of their ΔW: read like a `Corpus`, but a sketch is no adapter.

    Args:
        size: m, numbers per layer.
        seed: Of the pairs of vectors; sketches of other corpora compare if it, the layers and m are the same.
    """

    gauge = "known"
    """Sketches of adapters that began differently can be compared."""

    def __init__(self, corpus: Corpus, size: int = 64, seed: int = 0):
        self.corpus, self.size, self.seed = corpus, size, seed
        self.ids, self.index = corpus.ids, corpus.index
        self.base_fingerprint, self.init_seed = corpus.base_fingerprint, corpus.init_seed
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for down in (s for s in corpus.layout.slices if s.part == "A"):
            up = next(s for s in corpus.layout.slices if s.layer == down.layer and s.part == "B")
            scale = corpus.layout.alphas[down.layer] / down.shape[0] / size**0.5
            draws = torch.Generator().manual_seed(_seed(seed, down.layer))
            left = torch.randn(size, up.shape[0], generator=draws)
            self._pairs[down.layer] = scale * left, torch.randn(size, down.shape[1], generator=draws)

    def __len__(self) -> int:
        return len(self.corpus)

    @property
    def width(self) -> int:
        """Layers · m."""
        return len(self._pairs) * self.size

    @property
    def fingerprint(self) -> str:
        told = json.dumps([self.corpus.fingerprint, self.size, self.seed])
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def labels(self) -> dict[str, Tensor]:
        """See `Corpus.labels`."""
        return self.corpus.labels()

    def sketch(self, rows: Tensor) -> Tensor:
        """Rows `[n, D]` as sketches `[n, layers · m]`, layer by layer in the layout's order."""
        parts = self.corpus.layout.views(rows)
        found = []
        for layer, (left, right) in self._pairs.items():
            ups, downs = left @ parts[f"{layer}:B"], parts[f"{layer}:A"] @ right.T  # [n, m, R], [n, R, m]
            found.append((ups * downs.mT).sum(-1))
        return torch.cat(found, dim=-1)

    def blocks(self, rows: int) -> Iterator[Tensor]:
        """See `Corpus.blocks`."""
        return map(self.sketch, self.corpus.blocks(rows))

    def gather(self, indices: Sequence[int]) -> Tensor:
        """See `Corpus.gather`."""
        return self.sketch(self.corpus.gather(indices))

    def row(self, id: str) -> Tensor:  # noqa: A002 - the word of the index
        """See `Corpus.row`."""
        return self.sketch(self.corpus.row(id)[None])[0]


def _seed(seed: int, layer: str) -> int:
    digest = hashlib.blake2b(f"{seed}|sketch|{layer}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
