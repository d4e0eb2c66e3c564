"""Tiny random bases of every family, written once per session, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_personalize.backbones.base import Base
from lit_personalize.backbones.tiny import write_tiny_base
from lit_personalize.batch import Batch

FAMILIES = ("sd1", "sd2", "sd2-v", "sdxl")


@pytest.fixture(scope="session")
def tiny_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory per family."""
    root = tmp_path_factory.mktemp("bases")
    return {family: write_tiny_base(root / family, family) for family in FAMILIES}


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """Build a batch of random pictures for a base."""

    def make(base: Base, captions: list[str], roles: list[int] | None = None, seed: int = 0) -> Batch:
        draws = torch.Generator().manual_seed(seed)
        n = len(captions)
        return Batch(
            role=torch.tensor(roles or [0] * n),
            position=torch.arange(n),
            sample_id=[f"sample-{i}" for i in range(n)],
            pixels=torch.rand(n, 3, base.resolution, base.resolution, generator=draws) * 2 - 1,
            input_ids=base.tokenize(captions),
        )

    return make
