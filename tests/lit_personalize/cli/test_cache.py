"""`litp data cache`: filled once, found by every run; training on it runs neither VAE nor text encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lit_datamodules.concept_folder import Concept
from lit_datamodules.personalization import PersonalizationData
from lit_personalize.adapters.lora import LoRA
from lit_personalize.backbones.base import Base, StableDiffusion
from lit_personalize.batch import Batch
from lit_personalize.cli.main import main
from lit_personalize.objectives.denoising import Denoising
from lit_personalize.tinyworld.dataset import sample_pictures, write_folder


@pytest.fixture
def config(tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    write_folder(sample_pictures(3, 1, kind="object"), tmp_path / "photos")
    (tmp_path / "run.yaml").write_text(
        f"name: run\nmodel: {{init_args: {{base: {tiny_bases['sd1']}}}}}\n"
        "data: {init_args: {concepts: [{path: photos, class_noun: cat}], resolution: 32, cache_dir: cache}}\n"
        "sampling: {every: 100, steps: 2}\nexport: {verify: false}\ntrainer: {max_steps: 2}\n"
    )
    return ["-c", "lora/sd15", "-c", "run.yaml"]


def test_a_cache_is_filled_once_and_found_by_a_run(
    config: list[str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def said(*more: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["data", "cache", *config, *more, "--json"]) == 0
        return dict(json.loads(capsys.readouterr().out))

    first = said("--task", "1/2")
    assert first["latents"] == {"known": 0, "encoded": 1} and first["text states"]["encoded"] == 1
    assert said()["latents"] == {"known": 1, "encoded": 2}
    all_known = {"known": 3, "encoded": 0}
    assert said() == {"cache": "cache", "latents": all_known, "text states": all_known}
    assert main(["fit", *config]) == 0
    assert "cached the latents of 3 views, 3 of them were known" in caplog.text
    assert "text states of 3 captions, 3 of them were known" in caplog.text


def test_training_on_a_warm_cache_runs_neither_vae_nor_text_encoder(
    config: list[str], tiny_bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(cache: str | None) -> list[float]:
        objective = Denoising(str(tiny_bases["sd1"]), [LoRA(rank=2)])
        objective.configure_model()
        data = PersonalizationData([Concept("photos", "cat")], 32, batch_size=2, cache_dir=cache)
        data.bind(objective.built, objective.built)
        data.setup("fit")
        if data.text_store is not None:
            objective.keep_states(data.captions, data.text_store)
        batches = [Batch.of(data.batch_of_step(step)) for step in range(4)]
        return [float(objective.loss(batch, step).per_sample.detach().sum()) for step, batch in enumerate(batches)]

    plain = losses(None)
    assert losses("cache") == plain

    def touched(*_: object) -> None:
        raise AssertionError("an encoder ran")

    monkeypatch.setattr(Base, "encode_pixels", touched)
    monkeypatch.setattr(StableDiffusion, "encode_text", touched)
    with pytest.raises(AssertionError, match="an encoder ran"):
        losses(None)
    assert losses("cache") == plain


@pytest.mark.parametrize(
    ("recipe", "more", "expected"),
    [
        ("custom_diffusion/sd15", "token: <new1>", ("augmentation resizes", "an adapter trains the text side")),
        ("textual_inversion/sd15", "token: <new1>", (None, "an adapter trains the text side")),
    ],
)
def test_what_cannot_be_kept_says_why(
    recipe: str, more: str, expected: tuple[str | None, str], config: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path("run.yaml").read_text().replace("class_noun: cat", f"class_noun: cat, {more}, captions: prompt")
    regularization = "regularization: {folder: photos, prompt: a cat}, "
    Path("run.yaml").write_text(
        text.replace("resolution", f"{regularization}resolution") if "custom" in recipe else text
    )
    assert main(["data", "cache", "-c", recipe, "-c", "run.yaml", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    latents, states = expected
    assert states in report["text states"]
    # Textual Inversion mirrors half of the views; of Custom Diffusion only regularization pictures stand still.
    assert report["latents"]["encoded"] == (3 if latents else 6)
    assert latents in report["latents of instances"] if latents else "latents of instances" not in report


def test_a_cache_needs_a_folder(config: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text(Path("run.yaml").read_text().replace(", cache_dir: cache", ""))
    assert main(["data", "cache", *config]) == 2
    assert "no folder for the cache: give --dir" in capsys.readouterr().err
    assert main(["data", "cache", *config, "--dir", "elsewhere"]) == 0
    assert list(Path("elsewhere/latents").iterdir())
