"""Ranks by error, energy and sum, against spectra that are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_personalize.errors import UsageError
from lit_personalize.export.factorize import Truncation, factorize, nuclear_rank, summary


def _of_spectrum(values: list[float], rows: int = 20, columns: int = 12) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    n = len(values)
    u, _ = torch.linalg.qr(torch.randn(rows, n, dtype=torch.float64, generator=draws))
    v, _ = torch.linalg.qr(torch.randn(columns, n, dtype=torch.float64, generator=draws))
    return ((u * torch.tensor(values, dtype=torch.float64)) @ v.T).float()


def test_factorize_finds_the_smallest_rank() -> None:
    delta = _of_spectrum([1.0, 0.5, 1e-2, 1e-5])
    low_rank, kept = factorize(delta, Truncation(1e-3))
    assert low_rank.rank == kept.rank == 3 and kept.error <= 1e-3
    assert factorize(delta, Truncation(2e-2))[0].rank == 2
    assert factorize(delta, Truncation(0.9))[0].rank == 1
    assert factorize(torch.zeros(4, 3))[1].error == 0.0
    torch.testing.assert_close(low_rank.delta(), delta, atol=2e-5, rtol=0)


def test_the_recorded_error_is_the_one_the_factors_have() -> None:
    delta = _of_spectrum([3.0, 2.0, 1.0])
    low_rank, kept = factorize(delta, Truncation(0.3))
    assert low_rank.rank == 2
    assert kept.error == pytest.approx((1 / 14) ** 0.5, rel=1e-4)
    assert float((low_rank.delta() - delta).norm() / delta.norm()) == pytest.approx(kept.error, rel=1e-4)
    assert kept.energy == pytest.approx(13 / 14) and kept.nuclear == pytest.approx(5 / 6)
    assert kept.numbers == (2 * (20 + 12), 20 * 12)


def test_zero_error_keeps_everything() -> None:
    delta = torch.randn(9, 7)
    low_rank, kept = factorize(delta, Truncation(0.0))
    assert low_rank.rank == 7 and kept.error < 5e-7


@pytest.mark.parametrize(
    ("share", "rank"), [(0.3, 1), (0.4, 1), (0.5, 1), (0.51, 2), (0.6, 2), (0.8, 2), (0.81, 3), (0.9, 3), (1.0, 4)]
)
def test_the_sum_of_singular_values_decides(share: float, rank: int) -> None:
    """Of 5 + 3 + 1 + 1 the fewest that reach the share; the original code keeps one fewer, of 0.4 nothing."""
    values = torch.tensor([5.0, 3.0, 1.0, 1.0])
    assert nuclear_rank(values, share) == rank
    low_rank, kept = factorize(_of_spectrum(values.tolist()), Truncation(nuclear=share - 1e-4))
    assert low_rank.rank == rank and kept.nuclear >= share - 1e-4


@pytest.mark.parametrize(("share", "rank"), [(0.5, 1), (0.69, 1), (0.7, 2), (0.94, 2), (0.95, 3), (0.98, 4)])
def test_the_sum_of_squares_decides(share: float, rank: int) -> None:
    """25 + 9 + 1 + 1 is 36: shares 0.694, 0.944, 0.972, 1."""
    low_rank, kept = factorize(_of_spectrum([5.0, 3.0, 1.0, 1.0]), Truncation(energy=share))
    assert low_rank.rank == rank and kept.energy >= share
    assert kept.error == pytest.approx((1 - kept.energy) ** 0.5, abs=1e-6)


def test_a_share_that_is_just_reached_is_enough() -> None:
    """1 - 0.8 is less than 0.2 in floating point."""
    assert Truncation(energy=0.8).rank(torch.tensor([8.0, 2.0], dtype=torch.float64).sqrt()) == 1
    assert Truncation(nuclear=0.8).rank(torch.tensor([8.0, 2.0])) == 1
    assert Truncation(nuclear=0.5).rank(torch.zeros(3)) == Truncation(energy=0.5).rank(torch.zeros(3)) == 1


def test_the_bound_on_the_rank_goes_before_every_rule() -> None:
    values = torch.tensor([5.0, 3.0, 1.0, 1.0])
    for rule in ({"max_error": 0.0}, {"energy": 0.99}, {"nuclear": 0.99}):
        assert Truncation(**rule).rank(values) == 4 and Truncation(**rule, max_rank=3).rank(values) == 3  # type: ignore[arg-type]


def test_what_was_kept_is_said() -> None:
    how = Truncation(nuclear=0.6, max_rank=9)
    said = summary([factorize(_of_spectrum(v), how)[1] for v in ([5.0, 3.0, 1.0, 1.0], [9.0, 1.0])], how)
    assert said.startswith("2 dense layers at ranks 1 to 2 (nuclear >= 0.6, rank <= 9): of each at least 94.4% of the")
    assert "80.0% of the singular values' sum, in 20.0% of the numbers" in said and summary([], how) == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_error": -1.0}, "max_error must be 0"),
        ({"max_error": float("nan")}, "max_error must be 0"),
        ({"max_rank": 0}, "max_rank must be at least 1"),
        ({"energy": 0.0}, "energy must be a share"),
        ({"nuclear": 1.1}, "nuclear must be a share"),
        ({"energy": 0.9, "nuclear": 0.9}, "give one of them"),
    ],
)
def test_rules_that_keep_nothing_or_contradict_are_refused(given: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Truncation(**given)  # type: ignore[arg-type]
