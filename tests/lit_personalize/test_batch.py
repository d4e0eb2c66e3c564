"""The batch refuses what objectives could not use."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lit_personalize.batch import Batch, Role


def _mapping(**changes: Any) -> dict[str, Any]:
    base = {
        "role": torch.tensor([0, 1]),
        "position": torch.tensor([0, 1]),
        "sample_id": ["a", "b"],
        "pixels": torch.zeros(2, 3, 8, 8),
        "input_ids": (torch.zeros(2, 77, dtype=torch.int64),),
    }
    return {k: v for k, v in {**base, **changes}.items() if v is not None}


def test_a_good_mapping_becomes_a_batch() -> None:
    batch = Batch.of(_mapping())
    assert len(batch) == 2 and batch.where(Role.PRIOR).tolist() == [False, True]
    assert Batch.of(batch) is batch


def test_a_batch_moves_as_a_whole() -> None:
    batch = Batch.of(_mapping())
    assert batch.to(torch.device("cpu")) is batch
    moved = batch.to(torch.device("meta"))
    tensors = [moved.role, moved.position, moved.pixels, *(moved.input_ids or ())]
    assert [t.device.type for t in tensors if t is not None] == ["meta"] * 4
    assert moved.sample_id == batch.sample_id and moved.mask is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixels": None}, "has pixels, or latent_mean"),
        ({"latent_mean": torch.zeros(2, 4, 4, 4), "latent_std": torch.zeros(2, 4, 4, 4)}, "latent_mean has 2 .* not 0"),
        ({"pixels": torch.zeros(1, 3, 8, 8)}, "pixels has 1 samples, not 2"),
        ({"latent_mean": torch.zeros(2, 4, 4, 4)}, "come together"),
        ({"input_ids": None}, "either input_ids or text_states"),
        ({"sample_id": ["a"]}, "sample_id has 1 samples, not 2"),
        ({"colour": 1}, "unknown batch fields"),
        ({"role": None}, "missing batch fields"),
    ],
)
def test_a_bad_mapping_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batch.of(_mapping(**changes))
