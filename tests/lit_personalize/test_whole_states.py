"""What every rank holds whole, in the header of a sharded checkpoint; on two ranks: `strategies/test_strategies.py`."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from lit_personalize import whole_states
from lit_personalize.errors import DataError


def small_states(count: int) -> dict[str, Any]:
    """`count` factors of 64 bytes with Adam's states."""
    names = [f"adapters.0.factors.layer-{number}:A" for number in range(count)]
    states = {
        n: {"step": torch.tensor(3.0), "exp_avg": torch.randn(4, 4), "exp_avg_sq": torch.rand(4, 4)} for n in names
    }
    options = [{"lr": 1e-3, "betas": (0.9, 0.999), "params": names}]
    return {
        "state_dict": {n: torch.randn(4, 4) for n in names},
        "optimizer_0": {"state": states, "param_groups": options},
    }


def written(tree: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(tree, file)
    return file.getvalue()


def test_a_small_tensor_costs_a_header_little() -> None:
    few, many = (len(written(whole_states._packed(small_states(count)))) for count in (100, 300))
    assert (many - few) / 200 <= 4 * 64 + 1024  # what it is and its states, and 256 bytes for each
    assert len(written(small_states(300))) > 1.5 * many


def test_what_was_packed_is_read_as_it_was_without_running_code() -> None:
    tree = small_states(3)
    tree["state_dict"]["counts"] = torch.arange(5)
    read = torch.load(io.BytesIO(written(whole_states._packed(tree))), weights_only=True)
    found = whole_states._merged(tree, {}, read)
    assert found["optimizer_0"]["param_groups"] == tree["optimizer_0"]["param_groups"]
    first, second = whole_states._tensors(tree), whole_states._tensors(found)
    assert len(first) == 13 and all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(first, second, strict=True)
    )
    assert len({tensor.untyped_storage().data_ptr() for tensor in second}) == 13, "an optimizer changes them in place"


def test_a_state_that_is_nowhere_is_named() -> None:
    tree, saved = small_states(1), small_states(1)
    del saved["optimizer_0"]["state"]["adapters.0.factors.layer-0:A"]["exp_avg"]
    with pytest.raises(DataError, match=r"no optimizer_0\.state\.adapters\.0\.factors\.layer-0:A\.exp_avg, which"):
        whole_states._merged(tree, {}, saved)
