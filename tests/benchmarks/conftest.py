"""A tiny base for the session."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lit_personalize.backbones.tiny import write_tiny_base

    return write_tiny_base(tmp_path_factory.mktemp("base"))
