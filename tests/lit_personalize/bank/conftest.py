"""Recipes that the tests train alone and in banks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `solo_and_bank`

if TYPE_CHECKING:
    from solo_and_bank import Recipe


@pytest.fixture(scope="session")
def plain(tiny_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Rank 2 on q and v of all attention, as Weights2Weights has it."""
    from solo_and_bank import Recipe, narrow

    return Recipe(narrow(tiny_bases["sd1"], tmp_path_factory.mktemp("narrow") / "sd1"))
