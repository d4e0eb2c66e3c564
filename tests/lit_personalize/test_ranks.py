"""Which process owns the run directory, by what each launcher sets."""

from __future__ import annotations

import pytest

from lit_personalize.ranks import NUMBERS, is_rank_zero


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "3", "LOCAL_RANK": "1", "GROUP_RANK": "1"}, False),
        ({"RANK": "2", "LOCAL_RANK": "0", "SLURM_PROCID": "1"}, False),  # torchrun on the second node of a job
        ({"LOCAL_RANK": "1", "NODE_RANK": "0", "SLURM_PROCID": "0"}, False),  # Lightning's second process
        ({"NODE_RANK": "1"}, False),  # the first process on the second node, not started by any launcher
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "5"}, False),
    ],
)
def test_rank_zero(environment: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", *NUMBERS):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_rank_zero() == first
