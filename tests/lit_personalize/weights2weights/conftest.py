"""A planted corpus: rank-1 LoRAs of a tiny base that differ along known axes, and the space that they span."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_personalize.adapters.lora import LoRA
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.corpus.layout import Layout
from lit_personalize.corpus.store import Corpus
from lit_personalize.weights2weights.subspace import Subspace

COUNT, FACTORS = 60, 8


@dataclass(frozen=True)
class Planted:
    """Rows θ = θ_0 + Z M of known factors Z, on disk as a corpus and as a space."""

    base: Base
    corpus: Path
    folder: Path
    space: Subspace
    rows: Tensor
    """`[COUNT, D]`."""
    factors: Tensor
    """Z `[COUNT, FACTORS]`."""


def labels_of(factors: Tensor) -> list[dict[str, float]]:
    """Of the first two factors the signs; of the third its value; `rare` is not known of every third adapter."""
    found = []
    for number, z in enumerate(factors):
        told = {"beard": float(z[0] > 0), "hat": 1.0 if z[1] > 0 else -1.0, "age": float(z[2])}
        found.append(told if number % 3 == 0 else {**told, "rare": float(z[3] > 0.5)})
    return found


def span_of(rows: Tensor, layout: Layout, ids: Sequence[str], count: int, **details: object) -> Subspace:
    """The first standardised principal components of rows."""
    mean, deviation = rows.mean(0), rows.std(0).clamp(min=1e-12)
    standard = (rows - mean) / deviation
    u, s, vh = torch.linalg.svd(standard.double(), full_matrices=False)
    coefficients = (u * s)[:, :count]
    variances = coefficients.var(0)
    return Subspace(
        layout, mean, deviation, vh[:count].float().contiguous(), variances.float(), coefficients.float(), list(ids),
        details,
    )  # fmt: skip


@pytest.fixture
def span() -> Callable[..., Subspace]:
    """See `span_of`."""
    return span_of


@pytest.fixture(scope="session")
def planted(tiny_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Planted:
    folder = tmp_path_factory.mktemp("planted")
    base = load_base(tiny_bases["sd1"])
    adapter = LoRA(rank=1, alpha=27, targets="query_value", init="kaiming", init_seed=0)
    adapter.attach(load_base(tiny_bases["sd1"]))
    weights = adapter.export_weights()
    layout = Layout.of(weights)
    draws = torch.Generator().manual_seed(0)
    factors = torch.randn(COUNT, FACTORS, generator=draws)
    mixing = torch.randn(FACTORS, layout.width, generator=draws) * torch.linspace(0.3, 0.1, FACTORS)[:, None]
    rows = layout.flatten(weights) + 0.1 * factors @ mixing
    rows = rows + 0.001 * torch.randn(rows.shape, generator=draws)
    ids = [f"critter-{number:02d}" for number in range(COUNT)]
    corpus = Corpus.create(
        folder / "corpus", layout, base_fingerprint=base.fingerprint, init_seed=0, dtype="float32",
        base=str(tiny_bases["sd1"]),
    )  # fmt: skip
    told = labels_of(factors)
    corpus.append(rows, [{"id": name, "labels": told[number]} for number, name in enumerate(ids)])
    details = {"base_fingerprint": base.fingerprint, "base": str(tiny_bases["sd1"]), "init_seed": 0}
    space = span_of(rows, layout, ids, FACTORS, **details)
    space.save(folder / "space")
    return Planted(base, folder / "corpus", folder / "space", space, rows, factors)
