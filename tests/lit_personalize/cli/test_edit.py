"""`litp edit`: its files, its report, and its sentences for wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from lit_personalize.cli.main import main
from lit_personalize.tinyworld.dataset import sample_pictures

FAST = ["--steps", "2", "--base"]


def test_an_edit_leaves_pictures_a_grid_and_heat_maps(
    tiny_bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["a cat", "a dog", "a red cat", "--seeds", "3", "5", "--heat-maps", "--json", "-o", str(tmp_path / "out")]
    assert main(["edit", *given, "--blend", "cat,dog", *FAST, str(tiny_bases["sd1"])]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(p["prompt"], Path(p["file"]).name) for p in report["pictures"]] == [
        (prompt, f"{number:02d}_{seed}.png")
        for seed in (3, 5)
        for number, prompt in enumerate(("a cat", "a dog", "a red cat"))
    ]
    for picture in report["pictures"]:
        assert Image.open(picture["file"]).size == (32, 32) and Image.open(picture["heat_maps"]).width > 300
    assert Image.open(report["grid"]).width > 3 * 256


def test_a_photo_is_inverted_and_weighed(
    tiny_bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(sample_pictures(1, 1).pixels[0]).resize((90, 70)).save(photo)
    given = ["a cat", "--weigh", "cat=2", "--photo", str(photo), "-o", str(tmp_path / "out")]
    for more in ([], ["--guidance", "1"], ["--inversion", "ddim", "--refinements", "1"]):
        assert main(["edit", *given, *more, *FAST, str(tiny_bases["sd1"])]) == 0
        assert "rms error of the latent" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["00_photo.png", "01_photo.png", "grid.png", "photo.png"]


@pytest.mark.parametrize(
    ("given", "code", "sentence"),
    [
        (["--weigh", "cat"], 2, "'cat' is no number; write WORD=2"),
        (["--weigh", "=2"], 2, "names no word"),
        (["--weigh", "dog=2"], 2, "no word 'dog'; its words are a, cat"),
        (["a red dog", "--kind", "replace"], 2, "as many words"),
        (["--blend", "cat"], 2, "--blend says where an edit may change the picture; name an edit"),
        (["a dog", "--blend", "cow"], 2, "no prompt has the word 'cow'"),
        (["--cross-share", "2"], 2, "the cross share is a part of the steps from 0 to 1, not 2"),
        (["--inversion", "ddim"], 2, "name one with --photo"),
        (["--refinements", "1"], 2, "name one with --photo"),
        (["--photo", "none.png"], 3, "cannot read picture none.png"),
        (["--photo", "none.png", "--seeds", "1"], 2, "leave --seeds out"),
        (["--heat-maps", "7"], 2, "no cross-attention of 7 x 7 cells"),
    ],
)
def test_wrong_input_is_one_sentence(
    tiny_bases: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    code: int,
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["edit", "a cat", *given, *FAST, str(tiny_bases["sd1"])]) == code
    error = capsys.readouterr().err
    assert sentence in error and len([line for line in error.splitlines() if line.startswith("litp edit:")]) == 1
