"""Directions of attributes: the normals of linear classifiers of coefficients (Dravid et al., 2024, sec. 3.4).

A direction n is a unit vector in the first m components, and steps along it are in standard deviations of the corpus:
β' = β + α σ_n n, σ_n = std(B n), B [N, m] the corpus's coefficients. The published notebooks use the raw least-squares
solution without an intercept instead, whose α are about 10⁶ and depend on how labels are coded; here both, B and y,
are centred, which is a fit with an intercept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from lit_personalize.errors import DataError, UsageError
from lit_personalize.weights2weights.sampling import COMPONENTS
from lit_personalize.weights2weights.subspace import Subspace

Method = Literal["logistic", "least-squares"]
Removal = Literal["sequential", "orthogonal"]
METHODS: tuple[Method, ...] = ("logistic", "least-squares")
REMOVALS: tuple[Removal, ...] = ("sequential", "orthogonal")
ADAPTERS_PER_COMPONENT = 4
"""A fit of m numbers to N ≈ m adapters finds noise: by default m is at most a quarter of N."""
NOTHING = 1e-3


@dataclass(frozen=True)
class Direction:
    """Where an attribute grows, in the first m components."""

    name: str
    vector: Tensor
    """n `[m]`, of length 1, fp32."""
    deviation: float
    """σ_n, of the corpus's coefficients along n."""
    method: Method
    classes: bool
    """Whether the labels are yes and no; else they are numbers."""
    held_out: float
    """Of adapters that the fit did not see: balanced accuracy, or, of numbers, the correlation; NaN if too few."""
    counts: tuple[int, ...]
    """Adapters without and with the attribute; of numbers, all."""
    threshold: float = math.nan
    """Of classes: where along n yes begins."""
    kept: float = 1.0
    """Length of n that was left when other directions were removed."""
    removed: tuple[str, ...] = ()

    def along(self, coefficients: Tensor) -> Tensor:
        """Where adapters `[..., k]` lie along n."""
        return coefficients[..., : len(self.vector)] @ self.vector

    def step(self, space: Subspace, by: float) -> Tensor:
        """What a row changes for `by` deviations, `[D]`: α σ_n (n V) · deviation."""
        along = self.vector @ space.components[: len(self.vector)]
        return by * self.deviation * along * space.deviation


def find(
    coefficients: Tensor,
    labels: Tensor,
    name: str,
    method: Method = "logistic",
    components: int | None = None,
    folds: int = 5,
    l2: float = 0.01,
    seed: int = 0,
) -> Direction:
    """The direction of an attribute.

    Args:
        coefficients: B `[N, k]`.
        labels: `[N]`: 0 and 1, or -1 and 1, or numbers (with least squares alone); NaN is not known, and left out.
        method: "logistic" with classes of equal weight and an L2 penalty; "least-squares", the paper's.
        components: m; by default 1,000, or as many as there are, or a quarter of the adapters.
        folds: Of the cross-validation of `held_out`.
        l2: λ of λ/2 |w|² beside the mean loss, where the widest component has deviation 1.
        seed: Of the folds.

    Raises:
        DataError: Labels are coded otherwise, or all alike.
        UsageError: There are not that many components.
    """
    known = torch.isfinite(labels)
    y, classes = coded(labels[known].double(), name)
    if not classes and method == "logistic":
        method = "least-squares"
    most = coefficients.shape[1]
    m = max(1, min(COMPONENTS, most, len(y) // ADAPTERS_PER_COMPONENT)) if components is None else components
    if not 1 <= m <= most:
        raise UsageError(f"there are {most} components: take from 1 to {most} of them, not {m}")
    x = coefficients[known, :m].double()
    vector, threshold = _fit(x, y, method, classes, l2)
    return Direction(
        name, vector.float(), float((coefficients[:, :m].double() @ vector).std()), method, classes,
        _held_out(x, y, method, classes, folds, l2, seed),
        (int((y < 0).sum()), int((y > 0).sum())) if classes else (len(y),), threshold if classes else math.nan,
    )  # fmt: skip


def coded(labels: Tensor, name: str) -> tuple[Tensor, bool]:
    """Known labels as -1 and 1, or as numbers; and whether they are classes.

    Raises:
        DataError: There is one value alone, or it is not clear which of them mean yes and no.
    """
    values = sorted(set(labels.tolist()))
    if len(values) < 2:
        told = f"all {len(labels)} labels are {values[0]:g}" if values else "no adapter has this label"
        raise DataError(f"{name}: {told}; a direction needs adapters with and without it")
    if values in ([0.0, 1.0], [-1.0, 1.0]):
        return torch.where(labels > 0, 1.0, -1.0).double(), True
    if len(values) == 2 or values == [-1.0, 0.0, 1.0]:
        raise DataError(
            f"{name}: labels are {', '.join(f'{v:g}' for v in values)}; code yes and no as 1 and 0 or as 1 and -1, and "
            "leave unknown ones empty"
        )
    return labels, False


def without(
    direction: Direction, others: Sequence[Direction], coefficients: Tensor, how: Removal = "sequential"
) -> Direction:
    """The direction without what it has in common with others.

    Args:
        coefficients: B `[N, k]`, for the deviation along what is left.
        how: "sequential" is the paper's n <- n - (n·d/|d|²) d, one after the other: of others that overlap, only the
            last is wholly gone. "orthogonal" removes all that they span.

    Raises:
        DataError: Nothing is left.
        UsageError: They have other components.
    """
    n = direction.vector.double()
    spans = [other.vector.double() for other in others]
    if wrong := [other.name for other in others if len(other.vector) != len(n)]:
        raise UsageError(f"{wrong[0]} has other components than {direction.name}: find both with the same --components")
    if how == "orthogonal":
        basis = torch.linalg.svd(torch.stack(spans), full_matrices=False)
        rows = basis.Vh[basis.S > 1e-6 * basis.S[0]]
        n = n - (n @ rows.T) @ rows
    else:
        for d in spans:
            n = n - (n @ d) / (d @ d) * d
    left = float(n.norm())
    if left < NOTHING:
        raise DataError(f"nothing is left of {direction.name} without {', '.join(other.name for other in others)}")
    n = n / left
    return replace(
        direction, vector=n.float(), deviation=float((coefficients[:, : len(n)].double() @ n).std()),
        threshold=math.nan, kept=direction.kept * left, removed=(*direction.removed, *(other.name for other in others)),
    )  # fmt: skip


def _fit(x: Tensor, y: Tensor, method: Method, classes: bool, l2: float) -> tuple[Tensor, float]:
    """n `[m]` of length 1, and the place along it at which yes begins."""
    weights, threshold = _logistic(x, y, l2) if method == "logistic" else (_least_squares(x, y), 0.0)
    size = float(weights.norm())
    if not size > 0:
        return torch.nn.functional.one_hot(torch.tensor(0), x.shape[1]).double(), float("inf")
    vector = weights / size
    if method == "logistic":
        return vector, threshold / size
    if not classes:
        return vector, 0.0
    along = x @ vector  # halfway between the classes, however many each has
    return vector, float(along[y > 0].mean() + along[y < 0].mean()) / 2


def _least_squares(x: Tensor, y: Tensor) -> Tensor:
    """pinv(X) y of centred X and y, through the eigenvectors of XᵀX `[m, m]`."""
    x, y = x - x.mean(0), y - y.mean()
    values, vectors = torch.linalg.eigh(x.T @ x)
    usable = values > values[-1] * 1e-10
    inverse = torch.where(usable, 1 / torch.where(usable, values, 1.0), 0.0)
    return vectors @ (inverse * (vectors.T @ (x.T @ y)))


def _logistic(x: Tensor, y: Tensor, l2: float) -> tuple[Tensor, float]:
    """w `[m]` and the w·β at which both classes are as likely; every class has half of the weight."""
    middle, scale = x.mean(0), x.std(0).max().clamp(min=1e-30)
    inputs = (x - middle) / scale
    share = torch.where(y > 0, 0.5 / (y > 0).sum(), 0.5 / (y < 0).sum())
    w = torch.zeros(x.shape[1] + 1, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        margins = y * (inputs @ w[:-1] + w[-1])
        loss = (share * functional.softplus(-margins)).sum() + l2 / 2 * w[:-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[arg-type]
    found = w.detach()
    weights = found[:-1] / scale
    return weights, float(weights @ middle - found[-1])


def _held_out(x: Tensor, y: Tensor, method: Method, classes: bool, folds: int, l2: float, seed: int) -> float:
    """What fits on the other folds say of each: balanced accuracy, or correlation."""
    groups = [y > 0, y < 0] if classes else [torch.ones_like(y, dtype=torch.bool)]
    folds = min(folds, *(int(group.sum()) for group in groups))
    if folds < 2:
        return math.nan
    draws = torch.Generator().manual_seed(seed)
    fold = torch.empty(len(y), dtype=torch.long)
    for group in groups:  # each fold has its share of each class
        size = int(group.sum())
        fold[group] = (torch.arange(size) % folds)[torch.randperm(size, generator=draws)]
    said = torch.empty_like(y)
    for number in range(folds):
        seen, left = fold != number, fold == number
        vector, threshold = _fit(x[seen], y[seen], method, classes, l2)
        if classes:
            said[left] = torch.where(x[left] @ vector > threshold, 1.0, -1.0).double()
        else:
            along = x[seen] @ vector
            said[left] = (x[left] @ vector - along.mean()) / along.std()
    if classes:
        return float(sum((said[group] == y[group]).double().mean() for group in groups)) / 2
    return float(torch.corrcoef(torch.stack([said, y]))[0, 1])
