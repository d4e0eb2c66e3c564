"""The closed-form merge is the constrained optimum, a LoRA of the targets' rank, and refuses what has no solution."""

from __future__ import annotations

import pytest
import torch

from lit_personalize.errors import UsageError
from lit_personalize.merging.constrained_key_value import ConstrainedMerge

WIDTH, OUT, TARGETS = 24, 10, 4


def problem(seed: int = 0, rows: int = 90) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return (torch.randn(rows, WIDTH, dtype=torch.double), torch.randn(TARGETS, WIDTH, dtype=torch.double),
            torch.randn(OUT, WIDTH, dtype=torch.double), torch.randn(TARGETS, OUT, dtype=torch.double))  # fmt: skip


def change(merge: ConstrainedMerge, weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    up = merge.up(values - merge.targets @ weight.T)
    assert up.shape == (OUT, TARGETS) and merge.down.shape == (TARGETS, WIDTH)
    return up @ merge.down


@pytest.mark.parametrize("seed", range(3))
def test_it_solves_the_conditions_of_the_optimum(seed: int) -> None:
    """Stationarity 2 (W - W0) G + L C = 0 and W C^T = V^T as one linear system (Karush-Kuhn-Tucker)."""
    states, targets, weight, values = problem(seed)
    gram = states.T @ states
    system = torch.cat([torch.cat([2 * gram, targets.T], 1),
                        torch.cat([targets, torch.zeros(TARGETS, TARGETS, dtype=torch.double)], 1)])  # fmt: skip
    right = torch.cat([2 * gram @ weight.T, values])
    expected = torch.linalg.solve(system, right)[:WIDTH].T
    merge = ConstrainedMerge(states, targets)
    torch.testing.assert_close(weight + change(merge, weight, values), expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(merge.down @ merge.down.T, torch.eye(TARGETS, dtype=torch.double))


def test_it_meets_the_targets_and_no_other_change_is_smaller() -> None:
    states, targets, weight, values = problem()
    merged = weight + change(ConstrainedMerge(states, targets), weight, values)
    torch.testing.assert_close(merged @ targets.T, values.T, atol=1e-10, rtol=1e-10)
    cost = ((merged - weight) @ states.T).norm()
    free = torch.linalg.svd(targets, full_matrices=True)[2][TARGETS:]  # changes that no target sees
    for _ in range(20):
        other = merged + 0.1 * torch.randn(OUT, len(free), dtype=torch.double) @ free
        assert ((other - weight) @ states.T).norm() > cost


def test_what_has_no_solution_is_refused() -> None:
    states, targets, weight, values = problem(rows=12)
    with pytest.raises(UsageError, match="12 states of the regularization captions span 12 of 24 dimensions"):
        ConstrainedMerge(states, targets)
    merged = weight + change(ConstrainedMerge(states, targets, ridge=1e-6), weight, values)
    torch.testing.assert_close(merged @ targets.T, values.T, atol=1e-8, rtol=1e-8)
    states, targets, *_ = problem()
    with pytest.raises(UsageError, match="4 target states depend on each other"):
        ConstrainedMerge(states, torch.cat([targets[:3], targets[:1]]))
    with pytest.raises(UsageError, match="24 wide, targets 12"):
        ConstrainedMerge(states, targets[:, :12])
