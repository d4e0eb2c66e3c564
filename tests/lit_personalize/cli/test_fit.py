"""`litp fit` from a folder of pictures to verified files, for each method, and its mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lit_personalize import checkpoints
from lit_personalize.backbones.loading import load_base
from lit_personalize.cli.main import main
from lit_personalize.configuration import parse
from lit_personalize.recipe_files import names, recipe_text
from lit_personalize.run_directory import RunDirectory

METHODS = ("textual_inversion", "dreambooth_lora", "custom_diffusion", "lora")


def _init(base: Path, method: str = "custom_diffusion", *more: str) -> int:
    given = ["--images", "photos", "--class-noun", "cat", "--method", method, "--base", str(base), "--name", "run"]
    regularization = ["--regularization", "reg/00000.tar"] if method != "lora" else []
    return main(["init", *given, *regularization, "--steps", "3", *more])


SMALL = [
    "-c", "run.yaml", "--data.init_args.resolution", "32", "--data.init_args.batch_size", "1",
    "--checkpoint.every", "2", "--sampling.steps", "2", "--sampling.every", "2", "--model.init_args.dtype", "float32",
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "family"),
    [("textual_inversion", "sdxl"), ("dreambooth_lora", "sd2-v"), ("custom_diffusion", "sd1"), ("lora", "sdxl"),
     ("custom_diffusion", "sdxl"), ("textual_inversion", "sd1")],
)  # fmt: skip
def test_from_photos_to_verified_files(
    tiny_bases: dict[str, Path], workplace: Path, method: str, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _init(tiny_bases[family], method) == 0
    assert main(["fit", *SMALL]) == 0
    run = workplace / "runs" / "run"
    for place in ("README.md", "sheet.png", "manifest.jsonl", "config.yaml", "env.json", "samples/grid.png"):
        assert (run / place).exists(), place
    manifest = [json.loads(line) for line in (run / "manifest.jsonl").read_text().splitlines()]
    assert sum(r["path"].startswith("photos") for r in manifest) == 3
    assert (run / "exports" / "finished.json").exists()
    report = json.loads((run / "exports" / "verify.json").read_text())
    assert report["files"] and report["picture_difference"] <= 1 / 255 + 1e-6
    capsys.readouterr()
    adapters = sorted((run / "exports").glob("*.safetensors"))
    assert main(["inspect", str(adapters[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["base"] == family
    drawn = ["sample", "photo of a cat", "--base", str(tiny_bases[family]), "--adapter", str(run), "--steps", "2"]
    assert main(drawn) == 0
    assert (workplace / "samples" / "grid.png").exists()


def test_the_same_command_continues_and_then_rests(
    tiny_bases: dict[str, Path], workplace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert _init(tiny_bases["sd1"]) == 0
    straight = [*SMALL, "--name", "straight", "--trainer.max_steps", "5"]
    assert main(["fit", *straight]) == 0
    assert main(["fit", *SMALL]) == 0
    caplog.clear()
    assert main(["fit", *SMALL, "--trainer.max_steps", "5"]) == 0
    assert "resumed at step 3 of 5" in caplog.text
    assert main(["fit", *SMALL, "--trainer.max_steps", "5"]) == 0
    assert "has finished its 5 steps" in caplog.text
    one, two = (workplace / "runs" / n / "exports" / "learned_embeds.safetensors" for n in ("straight", "run"))
    assert load_file(one)["<new1>"].equal(load_file(two)["<new1>"])


def test_every_verb_of_a_run_speaks_json(
    tiny_bases: dict[str, Path], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One object is all that stands on stdout; `json.loads` refuses anything beside it."""

    def said(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main([*arguments, "--json"]) == 0, capsys.readouterr().err
        found = json.loads(capsys.readouterr().out)
        assert isinstance(found, dict)
        return found

    base = ["--base", str(tiny_bases["sd1"])]
    photos = ["--images", "photos", "--class-noun", "cat", "--method", "lora", "--name", "run", "--steps", "1"]
    assert said("init", *photos, *base) == {"config": "run.yaml"}
    assert said("data", "sheet", "-c", "run.yaml") == {"files": 3, "used": 3, "sheet": "sheet.png"}
    trained = said("fit", *SMALL, "--export.verify", "false")
    file = "runs/run/exports/pytorch_lora_weights.safetensors"
    assert trained["run"] == "runs/run" and trained["step"] == 1 and file in trained["exports"]
    assert trained["files"]["config.yaml"] == "runs/run/config.yaml"
    assert said("fit", *SMALL, "--export.verify", "false") == trained
    shown = said("runs", "show", "runs/run")
    assert trained.items() <= shown.items() and shown["state"] == "finished"
    assert said("export", "runs/run", "--formats", "peft", "--no-verify")["exports"] == [
        *trained["exports"], "runs/run/exports/peft/unet/adapter_model.safetensors",
    ]  # fmt: skip
    (row,) = said("runs", "ls")["runs"]
    assert row["name"] == "run" and row["step"] == 1
    drawn = said("sample", "a cat", *base, "--adapter", file, "--seeds", "3", "--steps", "1")
    (picture,) = drawn["pictures"]
    adapters = {"adapters": Path(file).stem, "strength": 1.0}
    assert picture == {"file": "samples/00_3.png", "prompt": "a cat", "seed": 3, **adapters}
    assert said("inspect", file)["base"] == "sd1"
    assert said("verify", file, *base)["files"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model.init_args.prior_weigth", "2"], 2, "did you mean 'prior_weight'?"),
        (["--trainer.max_stepz", "2"], 2, "did you mean 'max_steps'?"),
        (["--sampling.evry", "2"], 2, "did you mean 'every'?"),
        (["--trainer.max_steps", "many"], 2, "max_steps"),
        (["--resume", "must"], 2, "no complete checkpoint"),
        (["-c", "custom_difusion/tinyworld"], 2, "did you mean 'custom_diffusion/tinyworld'?"),
        (["--model.init_args.base", "nowhere"], 3, "not found"),
        (["--data.init_args.concepts", "[]"], 2, "concepts is empty"),
        (["--data.init_args.concepts", "[{path: nowhere, class_noun: cat, token: <new1>}]"], 3, "nowhere"),
        (["--data.init_args.concepts", "[{path: photos, class_noun: cat, token: <new1>, prompt: a cat}]"], 2,
         "token <new1> is not in"),
    ],
)  # fmt: skip
def test_mistakes_get_one_message_and_a_code(
    tiny_bases: dict[str, Path], workplace: Path, arguments: list[str], code: int, message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert _init(tiny_bases["sd1"]) == 0
    capsys.readouterr()
    found = main(["fit", *SMALL, *arguments])
    text = capsys.readouterr().err
    assert message in text
    assert found == code, text
    assert len([line for line in text.splitlines() if line.startswith("litp fit:")]) == 1
    assert "Traceback" not in text


def test_a_corrupt_picture_among_good_ones(
    tiny_bases: dict[str, Path], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _init(tiny_bases["sd1"]) == 0
    (workplace / "photos" / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    assert main(["fit", *SMALL]) == 3
    assert "broken.jpg" in capsys.readouterr().err
    assert main(["fit", *SMALL, "--data.init_args.strict", "false"]) == 0
    manifest = [json.loads(li) for li in (workplace / "runs/run/manifest.jsonl").read_text().splitlines()]
    assert [r["fate"] for r in manifest if r["path"].endswith("broken.jpg")] == ["skipped"]


def test_a_run_has_one_owner(tiny_bases: dict[str, Path], workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _init(tiny_bases["sd1"]) == 0
    with RunDirectory("runs", "run").create().lock():
        assert main(["fit", *SMALL]) == 2
    assert re.search(r"runs/run", capsys.readouterr().err)


def test_out_of_memory_while_sampling_does_not_end_training(
    tiny_bases: dict[str, Path], workplace: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from lit_callbacks import sample_grid

    def fail(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("not enough memory")

    monkeypatch.setattr(sample_grid, "generate", fail)
    assert _init(tiny_bases["sd1"], "lora") == 0
    assert main(["fit", *SMALL]) == 0
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and "memory" in r.getMessage()]
    assert any("training goes on" in message for message in warned), caplog.text
    found = checkpoints.find_complete(workplace / "runs/run/checkpoints")
    assert found is not None and found.step == 3
    assert not (workplace / "runs/run/samples/grid.png").exists()


@pytest.mark.parametrize("recipe", names())
def test_every_recipe_parses(recipe: str, tmp_path: Path) -> None:
    given = ["-c", recipe] if not recipe.startswith("hardware/") else ["-c", "custom_diffusion/sd15", "-c", recipe]
    _, config = parse([*given, "--name", "run"])
    assert config.model.class_path.endswith(("Denoising", "PriorPreservation", "MergedDistillation"))
    assert config.data.init_args.resolution >= 64


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("key", ["tinyworld", "sd15", "sd21", "sdxl"])
def test_every_method_has_a_recipe_for_every_base(method: str, key: str) -> None:
    assert f"base: {key}" in recipe_text(method, key, key, "<new1>")


def test_data_check_and_sheet_need_no_base(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--images", "photos", "--class-noun", "cat", "--regularization", "reg/00000.tar"]) == 0
    capsys.readouterr()
    assert main(["data", "check", "-c", "run.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["used"] >= 9  # photos, samples, and the shard itself
    assert main(["data", "sheet", "-c", "run.yaml"]) == 0
    assert (workplace / "sheet.png").exists()


def test_a_token_begins_at_the_class_noun(
    tiny_bases: dict[str, Path], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _init(tiny_bases["sd1"], "textual_inversion") == 0
    assert "init: CLASS" in (workplace / "run.yaml").read_text()
    optimizer = "--model.init_args.optimizer.init_args"
    assert main(["fit", *SMALL, f"{optimizer}.lr", "0.0", f"{optimizer}.weight_decay", "0"]) == 0
    base = load_base(tiny_bases["sd1"])
    row = base.text_encoders[0].get_input_embeddings().weight[base.tokenizers[0]("cat").input_ids[1]]
    learned = load_file(workplace / "runs/run/exports/learned_embeds.safetensors")["<new1>"]
    assert torch.allclose(learned.float().flatten(), row.float(), atol=1e-3)
    capsys.readouterr()
    nameless = "[{path: photos, token: <new1>, class_noun: '', prompt: a photo of a <new1>}]"
    assert main(["fit", *SMALL, "--name", "other", "--data.init_args.concepts", nameless]) == 2
    assert "no concept with a class_noun" in capsys.readouterr().err


def test_without_a_progress_bar(
    tiny_bases: dict[str, Path], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _init(tiny_bases["sd1"], "lora") == 0
    capsys.readouterr()
    assert main(["fit", *SMALL, "--sampling.prompts", "[]", "--trainer.enable_progress_bar", "false"]) == 0
    assert "step 3/3" not in capsys.readouterr().err


def test_a_moving_average_is_what_is_exported(tiny_bases: dict[str, Path], workplace: Path) -> None:
    """`ema` exports the average of the factors, not the factors that training goes on with."""
    assert _init(tiny_bases["sd1"], "lora") == 0
    assert main(["fit", *SMALL, "--sampling.prompts", "[]", "--ema", "0.5", "--export.formats", "[peft]"]) == 0
    run = workplace / "runs" / "run"
    found = checkpoints.find_complete(run / "checkpoints")
    assert found is not None
    trained, averaged = (checkpoints.load_state(found.path, averaged=which) for which in (False, True))
    written = load_file(run / "exports" / "peft" / "unet" / "adapter_model.safetensors")
    for name, value in averaged.items():
        layer, _, part = name.removeprefix("adapters.0.factors.unet|").replace("|", ".").rpartition(":")
        assert torch.equal(written[f"base_model.model.{layer}.lora_{part}.weight"], value)
    assert any(not torch.equal(trained[name], value) for name, value in averaged.items())
