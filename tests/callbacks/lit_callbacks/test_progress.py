"""Plain lines where no one is watching, a bar on a terminal, nothing on stdout."""

from __future__ import annotations

import os
import pty
import re
import sys
import threading
from pathlib import Path

import pytest
from tiny_training import train

from lit_callbacks.progress import Progress
from lit_callbacks.run_checkpoint import RunCheckpoint
from lit_callbacks.throughput import Throughput

LINE = re.compile(r"^step (\d+)/6  loss \d+\.\d{4}  \d+\.\d images/s  0:00:\d\d left$")


def test_plain_lines_on_stderr(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def callbacks() -> list[object]:
        return [Throughput(), Progress(plain_every=2), RunCheckpoint(tmp_path / "checkpoints", every=3)]

    train(base, tmp_path, 6, callbacks())
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("step ")]
    assert [LINE.fullmatch(line)[1] for line in lines] == ["2", "4", "6"], lines  # type: ignore[index]
    assert "images/s" not in out


def test_silent_on_request(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(base, tmp_path, 2, [Progress(plain_every=0)])
    assert "step" not in capfd.readouterr().err


def test_bar_on_a_terminal(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stderr is a real pseudo-terminal; the bar reaches the last step and gives the terminal back."""
    outer, inner = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        while True:
            try:
                if not (part := os.read(outer, 65536)):
                    return
            except OSError:  # the other side is closed
                return
            shown.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    with os.fdopen(inner, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        train(base, tmp_path, 3, [Throughput(), Progress()])
        terminal.flush()
    reader.join(10)
    os.close(outer)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", b"".join(shown).decode())
    assert "3/3" in text and re.search(r"loss \d\.\d{4}  \d+\.\d images/s", text) and "left" in text
    assert b"\x1b[?25h" in b"".join(shown), "the cursor must be shown again"


def test_throughput_is_the_median_rate() -> None:
    meter = Throughput(window=5)
    assert meter.images_per_second is None
    meter.rates.extend([4.0, 4.0, 0.01, 4.2, 4.1, 4.1])
    assert meter.images_per_second == 4.1


def test_throughput_is_logged_when_the_loggers_are_due(base: Path, tmp_path: Path) -> None:
    trainer, _ = train(base, tmp_path, 3, [Throughput()], log_every_n_steps=2)
    assert trainer.callback_metrics["images_per_second"] > 0
    trainer, _ = train(base, tmp_path, 3, [Throughput()], log_every_n_steps=4)
    assert "images_per_second" not in trainer.callback_metrics
