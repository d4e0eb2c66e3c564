"""A cell of the matrix runs from pictures to figures, and its name changes with what decides its result."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from concurrent.futures import BrokenExecutor
from pathlib import Path

import numpy as np
import pytest

from lit_personalize.report import science
from lit_personalize.report.running import run_missing
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
    subjects = len(science.METHODS) * len(science.SUBJECTS_FOR_SCIENCE)
    styles = len(science.STYLE_METHODS) * len(science.STYLES_FOR_SCIENCE)
    pairs = sum(map(len, science.COMBINATIONS.values()))
    assert len(order) == len(set(order)) == 3 * (subjects + styles + pairs)
    first = order[: len(order) // 3]
    assert {seed for _, _, seed in first} == {0}
    assert {method for method, _, _ in first} == {*science.METHODS, *science.COMBINATIONS}


CELLS = [("OFT", "a", 0), ("OFT", "b", 0), ("LoRA", "a", 0), ("LoRA", "b", 1)]


def one_of_two(method: str, subject: str, seed: int, wide: int) -> dict[str, object]:
    """A cell that fails for a subject; runs in a process of its own."""
    if subject == "a":
        raise MemoryError("too large a picture")
    shown = np.full((4, wide, 3), 7, np.uint8)
    return {"method": method, "subject": subject, "seed": seed, "seconds": 1, "shown": shown}


def test_a_failing_cell_is_told_and_loses_no_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    places = {cell: tmp_path / f"{i}.json" for i, cell in enumerate(CELLS)}
    assert run_missing(places, 0, time.monotonic() + 600, 2, one_of_two, 12) == 2
    err = capfd.readouterr().err
    assert err.count("failed: MemoryError: too large a picture") == 2 and "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.json", "1.png", "3.json"], "pictures of one seed"
    assert json.loads((tmp_path / "3.json").read_text()) == {
        "method": "LoRA", "subject": "b", "seed": 1, "seconds": 1,
    }  # fmt: skip


def test_no_cell_starts_after_the_budget(tmp_path: Path) -> None:
    assert run_missing({CELLS[1]: tmp_path / "0.json"}, 0, time.monotonic() - 1, 1, one_of_two, 12) == 0
    assert not list(tmp_path.iterdir())


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
        run_missing({CELLS[0]: tmp_path / "0.json"}, 0, time.monotonic() + 600, 1, killed)
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
