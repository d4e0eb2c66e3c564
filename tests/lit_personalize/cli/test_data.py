"""`litp data check|sheet`: what it says of pictures is what training on that base would see."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from lit_personalize.backbones.loading import tinyworld_directory
from lit_personalize.cli.data import native_geometry
from lit_personalize.cli.main import main
from lit_personalize.errors import DataError

RUN = """\
model: {class_path: Denoising, init_args: {base: BASE, adapters: [{class_path: LoRA}]}}
data:
  class_path: PersonalizationData
  init_args: {concepts: [{path: photos, class_noun: cat}], resolution: RESOLUTION, cache_latents: true}
"""


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """The configs of the embedded base, without a single weight."""
    for part in ("unet", "vae"):
        (tmp_path / "base" / part).mkdir(parents=True)
        shutil.copy(tinyworld_directory() / part / "config.json", tmp_path / "base" / part)
    return tmp_path / "base"


def test_geometry_is_read_from_configs_alone(configs: Path, tiny_bases: dict[str, Path]) -> None:
    assert native_geometry("tinyworld") == native_geometry(str(configs)) == (64, 4)
    assert native_geometry(str(tiny_bases["sdxl"])) == (32, 2)
    file = configs / "model.safetensors"
    file.write_bytes(b"")
    assert native_geometry(str(file), str(configs)) == (64, 4) and native_geometry(str(file)) is None
    (configs / "vae" / "config.json").write_text("{}")
    with pytest.raises(DataError, match="block_out_channels"):
        native_geometry(str(configs))


@pytest.mark.parametrize(("base", "side"), [("tinyworld", 64), ("nowhere", 512)])
def test_check_cuts_pictures_to_the_side_of_the_base(
    workplace: Path, base: str, side: int, caplog: pytest.LogCaptureFixture
) -> None:
    (workplace / "run.yaml").write_text(RUN.replace("BASE", base).replace("RESOLUTION", "null"))
    assert main(["data", "check", "-c", "run.yaml"]) == 0
    records = [json.loads(line) for line in (workplace / "manifest.jsonl").read_text().splitlines()]
    assert [record["sizes"] for record in records if record["role"] == "concept"] == [[[side, side]]] * 3
    assert ("nowhere" in caplog.text) == (base == "nowhere")


def test_check_refuses_a_resolution_between_latent_cells(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "run.yaml").write_text(RUN.replace("BASE", "tinyworld").replace("RESOLUTION", "66"))
    assert main(["data", "check", "-c", "run.yaml"]) == 2
    assert "no multiple of 4" in capsys.readouterr().err


def test_sheet_shows_masks_in_cells_of_the_base(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_datamodules import sheet

    shown: list[sheet.Section] = []
    draw = sheet.write_sheet
    monkeypatch.setattr(sheet, "write_sheet", lambda sections, path: (shown.extend(sections), draw(sections, path)))
    text = RUN.replace("BASE", "tinyworld")
    text = text.replace("RESOLUTION, cache_latents: true", "64, augmentation: custom_diffusion")
    (workplace / "run.yaml").write_text(text)
    assert main(["data", "sheet", "-c", "run.yaml"]) == 0
    masks = {tile.mask.shape for section in shown for tile in section.tiles if tile.mask is not None}
    assert masks == {(1, 16, 16)}
    assert Image.open("sheet.png").width > 100


def test_another_sampler_or_precision_draws_another_regularization_set(
    tiny_bases: dict[str, Path], workplace: Path
) -> None:
    from lit_personalize.configuration import instantiate, parse
    from lit_personalize.fitting import prepare_data
    from lit_personalize.run_directory import RunDirectory

    given = ["--images", "photos", "--class-noun", "cat", "--method", "lora", "--base", str(tiny_bases["sd1"])]
    assert main(["init", *given]) == 0
    sets = ["--data.init_args.regularization", '[{generate: 1, prompt: "a cat"}]', "--data.init_args.resolution", "32"]
    drawn = []
    for steps, dtype in ((1, "float32"), (1, "float32"), (2, "float32"), (1, "bfloat16")):
        how = ["--sampling.steps", str(steps), "--model.init_args.dtype", dtype]
        parser, config = parse(["-c", "run.yaml", *sets, *how])
        prepare_data(instantiate(parser, config), RunDirectory("runs", "run").create())
        drawn.append(len(list((workplace / "regularization").iterdir())))
    assert drawn == [1, 1, 2, 3]
