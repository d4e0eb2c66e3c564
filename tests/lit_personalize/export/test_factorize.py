"""Ranks by error, against spectra that are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_personalize.export.factorize import factorize


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
    assert factorize(delta, 0.9)[0].rank == 1
    assert factorize(torch.zeros(4, 3))[1] == 0.0
    torch.testing.assert_close(low_rank.delta(), delta, atol=2e-5, rtol=0)


def test_the_recorded_error_is_the_one_the_factors_have() -> None:
    delta = _of_spectrum([3.0, 2.0, 1.0])
    low_rank, error = factorize(delta, 0.3)
    assert low_rank.rank == 2
    assert error == pytest.approx((1 / 14) ** 0.5, rel=1e-4)
    assert float((low_rank.delta() - delta).norm() / delta.norm()) == pytest.approx(error, rel=1e-4)


def test_zero_error_keeps_everything() -> None:
    delta = torch.randn(9, 7)
    low_rank, error = factorize(delta, 0.0)
    assert low_rank.rank == 7 and error < 5e-7


def test_a_negative_error_is_refused() -> None:
    with pytest.raises(ValueError, match="max_error must not be negative"):
        factorize(torch.eye(3), -1.0)
