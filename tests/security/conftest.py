"""A working directory in which nothing may run, and commands that must be refused in one sentence."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `hostile`

import hostile  # noqa: E402


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion directory."""
    from lit_personalize.backbones.tiny import write_tiny_base

    return write_tiny_base(tmp_path_factory.mktemp("bases") / "sd1", "sd1")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory; a test in which a payload ran, or that wrote beside it, has failed."""
    place = tmp_path / "in" / "here"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    monkeypatch.delenv("LITP_ALLOW", raising=False)
    monkeypatch.setattr(logging, "raiseExceptions", False)
    yield place
    assert not hostile.ran(), "a payload ran"
    assert [p.name for p in tmp_path.iterdir()] == ["in"] and [p.name for p in place.parent.iterdir()] == ["here"]


Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run `litp`, expect an exit code and one message with these parts; returns the message."""
    from lit_personalize.cli.main import main

    def run(arguments: list[str], code: int, *parts: str) -> str:
        capsys.readouterr()
        found = main(arguments)
        text = capsys.readouterr().err
        assert found == code, text
        assert "Traceback" not in text and text.count(f"litp {arguments[0]}: ") == 1, text
        message = text[text.index(f"litp {arguments[0]}: ") :]
        assert message.count("\n") <= 2, message
        for part in parts:
            assert part in message, message
        return message

    return run
