"""`lit_personalize.fit` and its sisters resolve, each to the function it names."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

import lit_personalize

NAMES = [name for name in lit_personalize.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", NAMES)
def test_public_name_resolves(name: str) -> None:
    module, function = lit_personalize._PUBLIC[name]
    found = getattr(lit_personalize, name)
    assert callable(found) and found is getattr(import_module(module), function)


@pytest.mark.parametrize("name", NAMES)
def test_public_name_is_no_submodule(name: str) -> None:
    """Importing a submodule sets an attribute of its name, which would hide the function from then on."""
    home = Path(lit_personalize.__file__).parent
    assert not (home / name).exists() and not (home / f"{name}.py").exists()


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(AttributeError, match="load_adapter"):
        lit_personalize.fitt  # noqa: B018
