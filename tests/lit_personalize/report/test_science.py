"""A cell of the matrix runs from pictures to figures, and its name changes with what decides its result."""

from __future__ import annotations

import errno
import os
import signal
import time
from concurrent.futures import BrokenExecutor
from pathlib import Path

import numpy as np
import pytest

from lit_personalize.report import science
from lit_personalize.tinyworld.build import committed_weights
from lit_personalize.tinyworld.concepts import HELD_OUT_CONCEPTS
from lit_personalize.tinyworld.suite import asked_pictures, prompts_of


def test_a_cell_trains_and_measures(tmp_path: Path) -> None:
    figures = science.run_cell("Custom Diffusion, no regularization", "critter-03", 0, committed_weights(), tmp_path, 2)
    for name in ("attributes", "all attributes", "background"):
        assert all(0 <= figures[f"{name}{of}"] <= 1 for of in ("", ", real", ", base")), figures
    assert figures["attributes, real"] >= 0.9, "the reader knows the subject where it is drawn by the renderer"
    assert figures["attributes, base"] < figures["attributes, real"], "the base alone does not"
    assert figures["CLIP-I, base"] < figures["CLIP-I, real"]
    assert figures["nearest training picture, base"] < figures["nearest training picture, real"]
    assert figures["method"] == "Custom Diffusion, no regularization" and figures["seconds"] > 0
    adapted, real, base = np.split(figures["shown"], 3, axis=1)
    subject = HELD_OUT_CONCEPTS["critter-03"]
    assert np.array_equal(real, asked_pictures(subject, [prompts_of(subject, "<new1>")[0][1]])[0])
    assert not np.array_equal(adapted, base)


@pytest.mark.parametrize("change", ["subject", "seed", "fingerprint", "method"])
def test_a_cell_is_named_by_what_decides_it(change: str) -> None:
    given = {"method": "Textual Inversion", "subject": "critter-03", "seed": 0, "fingerprint": "a" * 64}
    other = {"method": "Custom Diffusion", "subject": "critter-11", "seed": 1, "fingerprint": "b" * 64}
    assert science.cell_id(**given) == science.cell_id(**given)
    assert science.cell_id(**given) != science.cell_id(**{**given, change: other[change]})


def test_every_method_and_subject_comes_before_the_next_seed() -> None:
    order = list(science.cells())
    assert len(order) == len(set(order)) == len(science.METHODS) * len(science.SUBJECTS_FOR_SCIENCE) * 3
    first = order[: len(order) // 3]
    assert {seed for _, _, seed in first} == {0} and {method for method, _, _ in first} == set(science.METHODS)


def one_of_two(method: str, subject: str, seed: int, weights: Path, cache: Path) -> dict[str, object]:
    """A cell that fails for a subject; runs in a process of its own."""
    if subject == science.SUBJECTS_FOR_SCIENCE[0]:
        raise MemoryError("too large a picture")
    shown = np.full((64, 192, 3), len(method), np.uint8)
    return {"method": method, "subject": subject, "seed": seed, "seconds": 1, "shown": shown}


def test_a_failing_cell_is_told_and_loses_no_other(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(science, "SEEDS", (0,))
    count = len(science.METHODS)
    assert science.run_missing(tmp_path, tmp_path / "cache", time.monotonic() + 600, 2, one_of_two) == count
    err = capfd.readouterr().err
    assert err.count("failed: MemoryError: too large a picture") == count and "Traceback" not in err
    finished = list(tmp_path.glob("*.json"))
    assert len(finished) == len(list(science.cells())) - count
    assert all(path.with_suffix(".png").exists() and "shown" not in path.read_text() for path in finished)
    loaded, _ = science.load_cells(tmp_path)
    assert len(loaded) == len(finished)


def test_a_full_disk_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "cells/a.json")

    monkeypatch.setattr(science, "run_missing", full)
    assert science.main(["--out", str(tmp_path / "cells")]) == 1
    assert capsys.readouterr().err == "cells/a.json: No space left on device; finished cells are kept\n"


def killed(*_: object) -> dict[str, object]:
    """A cell whose process is killed, as for lack of memory."""
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_a_killed_worker_ends_the_matrix(tmp_path: Path) -> None:
    with pytest.raises(BrokenExecutor):
        science.run_missing(tmp_path, tmp_path / "cache", time.monotonic() + 600, 1, killed)
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("option", "value", "said"), [("--jobs", "0", "--jobs 0: at least 1"), ("--budget", "5x", "'5x' is not a duration")]
)
def test_wrong_options_are_refused(
    option: str, value: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        science.main([option, value, "--out", str(tmp_path / "cells")])
    assert said in capsys.readouterr().err and not (tmp_path / "cells").exists()
