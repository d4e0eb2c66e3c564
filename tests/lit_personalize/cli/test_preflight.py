"""`litp fit` with parts that do not belong together: a token that no caption has, a prior without pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_personalize.cli.main import main
from lit_personalize.report.science import METHODS

FIT = [
    "fit", "-c", "run.yaml", "--data.init_args.resolution", "32", "--data.init_args.batch_size", "1",
    "--sampling.prompts", "[]", "--model.init_args.dtype", "float32", "--trainer.max_steps", "1",
    "--export.formats", "[diffusers]", "--export.verify", "false",
]  # fmt: skip


@pytest.fixture
def place(tiny_bases: dict[str, Path], workplace: Path) -> Path:
    """A run.yaml of Custom Diffusion whose token begins at a named word."""
    given = ["--images", "photos", "--class-noun", "cat", "--name", "run", "--regularization", "reg/00000.tar"]
    assert main(["init", *given, "--base", str(tiny_bases["sd1"])]) == 0
    path = workplace / "run.yaml"
    path.write_text(path.read_text().replace("init: CLASS", "init: cat"))
    return workplace


@pytest.mark.parametrize(
    ("concepts", "fix"),
    [
        (
            "[{path: photos, class_noun: cat, token: null, prompt: a photo of a cat}]",
            "data.concepts[0].token is missing, set it to <new1>",
        ),
        ("[{path: photos, class_noun: cat, token: <dog>}]", "data.concepts[0].token is <dog>, set it to <new1>"),
        ("[{path: photos, token: <new1>, prompt: '" + "a " * 80 + "<new1>'}]", "write it into them (at the front"),
    ],
)
def test_a_trained_token_that_no_caption_has(
    place: Path, capsys: pytest.CaptureFixture[str], concepts: str, fix: str
) -> None:
    assert main([*FIT, "--data.init_args.concepts", concepts]) == 2
    message = capsys.readouterr().err
    assert "token <new1> is trained, but no caption of a concept's pictures has it" in message
    assert fix in message
    assert not (place / "runs/run/config.yaml").exists()


def test_a_token_in_some_captions_is_enough(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    both = "[{path: photos, class_noun: cat, token: null}, {path: photos, class_noun: cat, token: <new1>}]"
    assert main([*FIT, "--data.init_args.concepts", both]) == 0
    assert "no adapter trains it" not in caplog.text


def test_a_token_that_nothing_trains_is_warned_of_unless_it_is_a_word(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lora = ["--model.init_args.adapters", "[{class_path: LoRA}]"]
    assert main([*FIT, *lora, "--data.init_args.concepts", "[{path: photos, class_noun: cat, token: <dog>}]"]) == 0
    assert "data.concepts[0].token <dog>: no adapter trains it, and the base reads it as" in caplog.text
    caplog.clear()
    word = "[{path: photos, class_noun: cat, token: dog}]"
    assert main([*FIT, *lora, "--name", "other", "--data.init_args.concepts", word]) == 0
    assert "no adapter trains it" not in caplog.text


def test_prior_preservation_wants_prior_pictures(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without = [*FIT, "--data.init_args.regularization", "null"]
    assert main(without) == 2
    message = capsys.readouterr().err
    assert "data.regularization" in message and "model.init_args.prior_weight: 0" in message
    assert main([*without, "--model.init_args.prior_weight", "0"]) == 0


def test_methods_without_regularization_say_so_or_have_no_prior() -> None:
    for name, method in METHODS.items():
        prior = method.recipe.startswith(("custom_diffusion", "dreambooth"))
        if prior and method.regularization == "none":
            assert method.changes[-2:] == ("--model.init_args.prior_weight", "0"), name
