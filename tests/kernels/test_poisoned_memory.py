"""The poison of `conftest.py` reaches every way of allocating."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

WAYS: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "empty": lambda dtype: torch.empty(3, 5, dtype=dtype),
    "empty_like": lambda dtype: torch.empty_like(torch.zeros(3, 5, dtype=dtype)),
    "empty_strided": lambda dtype: torch.empty_strided((3, 5), (1, 3), dtype=dtype),
    "new_empty": lambda dtype: torch.zeros(1, dtype=dtype).new_empty((3, 5)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_unwritten_floats_are_nan(way: str, dtype: torch.dtype) -> None:
    assert WAYS[way](dtype).isnan().all()


@pytest.mark.parametrize("way", WAYS)
def test_unwritten_integers_are_huge(way: str) -> None:
    assert (WAYS[way](torch.int64) == torch.iinfo(torch.int64).max).all()
