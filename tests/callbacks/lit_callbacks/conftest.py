"""A tiny base for the session, and the training that all these tests run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `tiny_training`, also in the processes that tests start


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lit_personalize.backbones.tiny import write_tiny_base

    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def metric_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lit_personalize.backbones.tiny import write_tiny_clip

    return write_tiny_clip(tmp_path_factory.mktemp("clip"))
