"""A place with pictures, where `litp` runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_personalize.tinyworld.dataset import sample_pictures, write_folder, write_shards


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three photos and a regularization shard, as working directory."""
    monkeypatch.chdir(tmp_path)
    write_folder(sample_pictures(3, 1, kind="object"), tmp_path / "photos")
    for extra in [*(tmp_path / "photos").glob("*.txt"), *(tmp_path / "photos").glob("*.json")]:
        extra.unlink()
    write_shards(sample_pictures(6, 2, kind="object"), tmp_path / "reg")
    return tmp_path
