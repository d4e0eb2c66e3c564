"""Rendered pictures as a user's folders and shards, and a tiny base for the session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random base with 32x32 pictures and 2 pixels per latent cell."""
    from lit_personalize.backbones.loading import load_base
    from lit_personalize.backbones.tiny import write_tiny_base

    return load_base(str(write_tiny_base(tmp_path_factory.mktemp("base"))))


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Write `count` rendered pictures with their captions into a new folder."""

    def write(name: str = "photos", count: int = 5, seed: int = 0, captions: bool = False, size: int = 64) -> Path:
        from lit_personalize.tinyworld.dataset import sample_pictures, write_folder

        path = tmp_path / name
        write_folder(sample_pictures(count, seed, size=size), path)
        for sidecar in [*path.glob("*.json"), *([] if captions else path.glob("*.txt"))]:
            sidecar.unlink()
        return path

    return write


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., Path]:
    """Write `count` rendered pictures as shards of five."""

    def write(count: int = 8, seed: int = 7) -> Path:
        from lit_personalize.tinyworld.dataset import sample_pictures, write_shards

        write_shards(sample_pictures(count, seed), tmp_path / "shards", per_shard=5)
        return tmp_path / "shards"

    return write
