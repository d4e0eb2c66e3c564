"""The embedded suite: its prompts are new, real renders score high, another subject scores low."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lit_personalize.backbones.tiny import write_tiny_clip
from lit_personalize.cli.main import main
from lit_personalize.tinyworld.build import committed_weights
from lit_personalize.tinyworld.concepts import HELD_OUT_CONCEPTS, subject_pictures
from lit_personalize.tinyworld.reader import Reader
from lit_personalize.tinyworld.suite import figures_by_reader, prompts_of, shares

SUBJECT = HELD_OUT_CONCEPTS["critter-03"]


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader.load(committed_weights() / "reader")


def test_prompts_name_token_class_and_background() -> None:
    asked = prompts_of(SUBJECT, "<new1>")
    assert len(asked) >= 8 and all("<new1> critter" in prompt for prompt, _ in asked)
    assert all(ground in prompt for prompt, ground in asked if ground not in ("night",))
    assert SUBJECT.attributes["color"] not in [ground for _, ground in asked]


def test_real_pictures_score_high_and_others_low(reader: Reader) -> None:
    grounds = ["red" if "red" in SUBJECT.backgrounds() else "white"] * 12
    own = subject_pictures(SUBJECT, 12, 3, tuple(grounds[:1])).pixels
    other = subject_pictures("navy-halved-oval", 12, 3, ("white",)).pixels
    high, low = (shares(pixels, SUBJECT, grounds, reader) for pixels in (own, other))
    assert high["attributes"] > 0.95 and high["all attributes"] > 0.75 and high["background"] == 1
    assert low["all attributes"] == 0 and low["attributes"] < high["attributes"] - 0.3
    assert shares(own, SUBJECT, ["blue"] * 12, reader)["background"] == 0


def test_every_figure_stands_beside_oracle_and_floor(reader: Reader) -> None:
    grounds = [ground for _, ground in prompts_of(SUBJECT, "<new1>")]
    measure = figures_by_reader(SUBJECT, grounds, reader)
    black = np.zeros((len(grounds), 64, 64, 3), np.uint8)
    figures = measure(black, black)
    for name in ("attributes", "all attributes", "background"):
        figure = figures[name]
        assert figure.oracle is not None and figure.oracle > 0.7 and figure.value == figure.floor < figure.oracle


def test_evaluate_with_the_embedded_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lit_personalize.adapters.lora import LoRA
    from lit_personalize.backbones.loading import load_base
    from lit_personalize.export.exporter import export

    base = load_base("tinyworld")
    adapter = LoRA(rank=1)
    adapter.attach(base)
    export(adapter.export_weights(), tmp_path / "exports", base, "none", ["diffusers"])
    clip = write_tiny_clip(tmp_path / "clip")
    asked = ["evaluate", "--adapter", str(tmp_path), "--suite", "tinyworld", "--clip", str(clip), "--seeds", "0"]
    assert main([*asked, "--steps", "1", "--subject", "critter-03"]) == 0
    shown = capsys.readouterr().out
    assert "attributes" in shown and "CLIP-I" in shown and "untouched base" in shown
    object.__setattr__(base, "fingerprint", "another")
    for file in (tmp_path / "exports").iterdir():
        file.unlink()
    export(adapter.export_weights(), tmp_path / "exports", base, "none", ["diffusers"])
    assert main([*asked, "--subject", "critter-03"]) == 3
    assert "force" in capsys.readouterr().err
    assert main([*asked, "--steps", "1", "--subject", "critter-03", "--force", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert all(figure["oracle"] is not None and figure["floor"] is not None for figure in figures.values())
    assert main([*asked, "--subject", "critter-3"]) == 2
    assert "no subject 'critter-3'" in capsys.readouterr().err
    assert main([*asked, "--subject", "critter-03", "--prompts", "a cat"]) == 2
