"""The space of a corpus: mean, standard deviation and principal components of its rows (sec. 3.2).

Row θ, coefficients β: Z = (θ - mean) / deviation, β = Z Vᵀ, θ = (β V) · deviation + mean. Legend: `n` rows, `D`
numbers in a row, `k` components.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_personalize import atomic
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.corpus.layout import Layout
from lit_personalize.errors import DataError

TENSORS = "subspace.safetensors"
RECORD = "subspace.json"
FORMAT = 1


@dataclass
class Subspace:
    """Standardised principal components of a corpus, fp32 on the CPU."""

    layout: Layout
    mean: Tensor
    """`[D]`."""
    deviation: Tensor
    """`[D]`; 1 where a column is constant."""
    components: Tensor
    """V `[k, D]`, orthonormal rows, by falling variance."""
    variances: Tensor
    """Of the corpus along each component, `[k]`."""
    coefficients: Tensor
    """β of the corpus, `[n, k]`."""
    ids: list[str]
    """Of the rows of `coefficients`."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """base_fingerprint, init_seed, corpus, method, total_variance, ..."""

    def __len__(self) -> int:
        return len(self.components)

    def project(self, rows: Tensor) -> Tensor:
        """Rows `[..., D]` to coefficients `[..., k]`."""
        return ((rows.float() - self.mean) / self.deviation) @ self.components.T

    def unproject(self, coefficients: Tensor) -> Tensor:
        """Coefficients `[..., j]`, j <= k, to rows `[..., D]`; differentiable.

        Raises:
            DataError: It is a space of sketches.
        """
        if self.details.get("sketch"):
            raise DataError("a space of sketches tells adapters apart and makes none: fit one without --sketch")
        return (coefficients @ self.components[: coefficients.shape[-1]]) * self.deviation + self.mean

    def save(self, folder: Path) -> None:
        """Write `subspace.safetensors` and `subspace.json`; whole, or not there."""
        folder.mkdir(parents=True, exist_ok=True)
        names = ("mean", "deviation", "components", "variances", "coefficients")
        staged = folder / f".tmp-{TENSORS}"
        save_file({name: getattr(self, name).contiguous() for name in names}, staged)
        staged.replace(folder / TENSORS)
        told = {"format": FORMAT, **self.details, "ids": self.ids, "layout": self.layout.to_json()}
        atomic.write_text(folder / RECORD, json.dumps(told, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Subspace:
        """Read a folder that `save` wrote.

        Raises:
            DataError: It is no subspace, or of a later format.
        """
        record = folder / RECORD
        if not record.is_file() or not (folder / TENSORS).is_file():
            raise DataError(f"{folder} holds no subspace of a corpus ({RECORD}): make one with litp w2w fit")
        told = json.loads(record.read_text(encoding="utf-8"))
        if told.pop("format") != FORMAT:
            raise DataError(f"{record} is of another format than {FORMAT}: make it again with litp w2w fit")
        layout, ids = Layout.from_json(told.pop("layout")), told.pop("ids")
        return cls(layout=layout, ids=ids, details=told, **load_file(folder / TENSORS))

    def weights_of(self, coefficients: Tensor) -> AdapterWeights:
        """The adapter at coefficients `[j]`."""
        return self.layout.unflatten(self.unproject(coefficients))
