"""Recipes say what they are, keep their papers' numbers, and come through `litp init` with their comments."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from lit_personalize.cli.init import METHODS as INIT
from lit_personalize.cli.init import run_yaml
from lit_personalize.cli.main import main
from lit_personalize.recipe_files import RECIPES, names

METHODS = sorted(name for name in names() if not name.startswith("hardware/"))
HARDWARE = sorted(name for name in names() if name.startswith("hardware/"))
REAL = ("sd15", "sd21", "sdxl")


def head(name: str) -> str:
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def merged(*recipes: str) -> dict[str, Any]:
    """What files behind one another make, key by key."""

    def join(first: Any, second: Any) -> Any:
        if not (isinstance(first, dict) and isinstance(second, dict)):
            return second
        return {**first, **{key: join(first.get(key), value) for key, value in second.items()}}

    found: dict[str, Any] = {}
    for name in recipes:
        found = join(found, yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8")))
    return found


def instances(recipe: dict[str, Any]) -> int:
    """Of one optimizer step."""
    return int(recipe["data"]["init_args"]["batch_size"] * recipe["trainer"].get("accumulate_grad_batches", 1))


@pytest.mark.parametrize("name", METHODS)
def test_head_names_paper_what_trains_and_hardware(name: str) -> None:
    said = head(name)
    assert re.match(r"# .+ \(.+, 20\d\d, arXiv \d{4}\.\d{5}\)", said)
    assert "\n# Trains " in said
    measured = "A laptop CPU is enough" if name.endswith("tinyworld") else "GB"
    assert measured in said and ("modelled" in said) == (measured == "GB")


@pytest.mark.parametrize("name", HARDWARE)
def test_hardware_is_said_to_be_modelled(name: str) -> None:
    assert "(modelled, not measured)" in head(name)


@pytest.mark.parametrize("base", REAL)
def test_custom_diffusion_trains_as_much_as_the_paper(base: str) -> None:
    """Kumari et al., 2022: 8e-5, 250 steps at a global batch of 8, half of it regularization."""
    recipe = merged(f"custom_diffusion/{base}")
    optimizer = recipe["model"]["init_args"]["optimizer"]["init_args"]
    assert optimizer == {"lr": 8e-5, "weight_decay": 0.01}
    assert instances(recipe) == 4 and recipe["trainer"]["max_steps"] == 250
    assert recipe["trainer"]["max_steps"] % recipe["checkpoint"]["every"] == 0


def test_faces_train_all_of_cross_attention_at_half_the_rate() -> None:
    """Published for people: 5e-6 times a batch of 4 times two GPUs, 750 steps, without the augmentation."""
    faces, whole = (merged(f"{method}/sd15") for method in ("custom_diffusion_faces", "custom_diffusion"))
    assert faces["model"]["init_args"]["adapters"][0]["init_args"] == {"which": "cross"}
    rates = [recipe["model"]["init_args"]["optimizer"]["init_args"]["lr"] for recipe in (faces, whole)]
    assert rates[0] == pytest.approx(rates[1] / 2) and instances(faces) == instances(whole)
    assert faces["trainer"]["max_steps"] == 750 and "augmentation" not in faces["data"]["init_args"]


@pytest.mark.parametrize("base", REAL)
def test_dreambooth_keeps_its_paper_s_numbers(base: str) -> None:
    """Ruiz et al., 2022: about 1000 steps at 5e-6 on Stable Diffusion, λ = 1."""
    recipe = merged(f"dreambooth/{base}")
    options = recipe["model"]["init_args"]
    assert options["optimizer"]["init_args"]["lr"] == 5e-6 and options["prior_weight"] == 1.0
    assert recipe["trainer"]["max_steps"] == 1000 and instances(recipe) == 1


@pytest.mark.parametrize("base", REAL)
def test_textual_inversion_scales_its_rate_by_the_batch(base: str) -> None:
    recipe = merged(f"textual_inversion/{base}")
    optimizer = recipe["model"]["init_args"]["optimizer"]["init_args"]
    assert optimizer == {"lr": pytest.approx(5e-4 * instances(recipe)), "weight_decay": 0.01}
    assert recipe["trainer"]["max_steps"] == 3000


@pytest.mark.parametrize("base", ("tinyworld", *REAL))
def test_pivotal_tuning_pivots_at_the_half(base: str) -> None:
    """Two rows at random, drawn to the vocabulary's deviation, that rest from the half on; LoRA for all steps."""
    model = merged(f"pivotal_tuning/{base}")["model"]["init_args"]
    rows, lora = (adapter["init_args"] for adapter in model["adapters"])
    assert rows["token"] == "<s0><s1>" and rows["init"] == "RANDOM" and rows["norm"] == "deviation"
    assert rows["span"] == [0, 0.5] and "span" not in lora and model["snr_gamma"] == 5
    if base != "tinyworld":
        assert model["optimizer"]["init_args"]["lr"] == 1e-4
        assert (rows["lr"], lora["rank"]) == ((3e-4, 32) if base == "sdxl" else (5e-4, 4))


@pytest.mark.parametrize(
    "method", sorted({name.split("/")[0] for name in METHODS if name.endswith("/sdxl")} - {"dreambooth"})
)
def test_the_card_for_every_sdxl_method_keeps_it_small(method: str) -> None:
    recipe = merged(f"{method}/sdxl", "hardware/24gb")
    assert recipe["data"]["init_args"]["batch_size"] == 1
    assert recipe["model"]["init_args"]["gradient_checkpointing"] is True
    assert instances(recipe) == 4, "an optimizer step is that of the smaller cards"


@pytest.mark.parametrize("name", [name for name in METHODS if name.split("/")[0] in INIT])
def test_init_keeps_the_comments(name: str) -> None:
    method, key = name.split("/")
    text = run_yaml(method, key, Path("photos"), "cat", "<new1>", "", "run")
    assert all(line in text.splitlines() for line in head(name).splitlines())
    (concept,) = yaml.safe_load(text)["data"]["init_args"]["concepts"]
    assert concept["path"] == "photos" and "      # Describe a picture" in text


@pytest.mark.parametrize(
    ("method", "given", "token"),
    [
        ("dreambooth_lora", [], "sks"),
        ("dreambooth", [], "sks"),
        ("dreambooth_lora", ["--token", "olis"], "olis"),
        ("custom_diffusion", [], "<new1>"),
    ],
)
def test_init_names_the_subject_by_a_word_that_can_be_learned(
    tmp_path: Path, method: str, given: list[str], token: str
) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "a.png")
    asked = ["init", "--images", str(tmp_path / "photos"), "--class-noun", "cat", "--method", method]
    assert main([*asked, *given, "-o", str(tmp_path / "run.yaml")]) == 0
    written = yaml.safe_load((tmp_path / "run.yaml").read_text())
    data = written["data"]["init_args"]
    assert data["concepts"][0]["token"] == token and written["sampling"]["prompts"][0] == f"photo of a {token} cat"
    assert data["regularization"][0]["generate"] == 200
    adapters = written["model"]["init_args"]["adapters"]
    trained = [adapter.get("init_args", {}).get("token") for adapter in adapters]
    assert (token in trained) == (token != "sks" and method != "dreambooth_lora")


@pytest.mark.parametrize("method", ["custom_diffusion", "textual_inversion"])
def test_init_of_a_style_speaks_of_paintings(tmp_path: Path, method: str) -> None:
    (tmp_path / "inks").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "inks" / "a.png")
    asked = ["init", "--images", str(tmp_path / "inks"), "--class-noun", "art", "--style", "-o"]
    assert main([*asked, str(tmp_path / "run.yaml"), "--method", method]) == 0
    written = yaml.safe_load((tmp_path / "run.yaml").read_text())
    data, sentence = written["data"]["init_args"], "painting in the style of {token} {class}"
    assert data["concepts"][0]["prompt"] == (sentence if method == "custom_diffusion" else "style")
    assert all(prompt.endswith("in the style of <new1> art") for prompt in written["sampling"]["prompts"])
    if method == "custom_diffusion":
        assert data["regularization"][0]["prompt"] == "painting in the style of art"
    assert main([*asked, str(tmp_path / "other.yaml"), "--method", "b_lora"]) == 2
