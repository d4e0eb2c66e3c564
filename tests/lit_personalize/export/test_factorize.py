"""Ranks by error, by share and by request, against spectra that are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_personalize.export.factorize import factorize, rank_of_share


def _of_spectrum(values: list[float], rows: int = 20, columns: int = 12) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    n = len(values)
    u, _ = torch.linalg.qr(torch.randn(rows, n, dtype=torch.float64, generator=draws))
    v, _ = torch.linalg.qr(torch.randn(columns, n, dtype=torch.float64, generator=draws))
    return ((u * torch.tensor(values, dtype=torch.float64)) @ v.T).float()


def test_factorize_finds_the_smallest_rank() -> None:
    delta = _of_spectrum([1.0, 0.5, 1e-2, 1e-5])
    low_rank, error = factorize(delta, 1e-3)
    assert low_rank.rank == 3 and error <= 1e-3
    assert factorize(delta, 2e-2)[0].rank == 2
    assert factorize(delta, rank=1)[0].rank == 1
    assert factorize(torch.zeros(4, 3))[1] == 0.0
    torch.testing.assert_close(low_rank.delta(), delta, atol=2e-5, rtol=0)


def test_the_recorded_error_is_the_one_the_factors_have() -> None:
    delta = _of_spectrum([3.0, 2.0, 1.0])
    low_rank, error = factorize(delta, rank=2)
    assert error == pytest.approx((1 / 14) ** 0.5, rel=1e-4)
    assert float((low_rank.delta() - delta).norm() / delta.norm()) == pytest.approx(error, rel=1e-4)


def test_zero_error_keeps_everything() -> None:
    delta = torch.randn(9, 7)
    low_rank, error = factorize(delta, 0.0)
    assert low_rank.rank == 7 and error < 5e-7


def test_shares_count_the_value_that_reaches_them() -> None:
    singular = torch.tensor([5.0, 3.0, 1.0, 1.0])
    assert [rank_of_share(singular, share, 1) for share in (0.4, 0.5, 0.6, 0.8, 0.81, 1.0)] == [1, 1, 2, 2, 3, 4]
    assert [rank_of_share(singular, share, 2) for share in (0.6, 25 / 36, 0.7, 1.0)] == [1, 1, 2, 4]
    assert rank_of_share(torch.zeros(3), 0.5, 1) == 1
    delta = _of_spectrum([5.0, 3.0, 1.0, 1.0])
    assert factorize(delta, nuclear=0.6)[0].rank == 2
    assert factorize(delta, energy=0.69)[0].rank == 1


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"energy": 0.0}, {"nuclear": 1.5}, {"max_error": -1.0},
                                   {"rank": 1, "energy": 0.5}])  # fmt: skip
def test_impossible_requests_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        factorize(torch.eye(3), **wrong)  # type: ignore[arg-type]
