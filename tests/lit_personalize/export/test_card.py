"""The model card: its snippet really loads the files, its front matter parses, its figures are the run's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.oft import OFT
from lit_personalize.adapters.protocol import Adapter, AdapterWeights
from lit_personalize.adapters.token_embedding import TokenEmbedding
from lit_personalize.backbones.base import Base
from lit_personalize.errors import DataError
from lit_personalize.export.card import EVALUATION, loading_snippet, recipe_rows, write_card
from lit_personalize.export.exporter import Exported, export
from lit_personalize.export.stock import stock_pipeline
from lit_personalize.export.verify import verify
from lit_personalize.run_directory import RunDirectory
from lit_personalize.sampling.sampler import SamplingOptions, generate, start_noise

Train = Callable[[Path, list[Adapter]], tuple[Base, AdapterWeights]]
PROMPTS = ['a "red" photo of a cat', "a <new1> cat: on a beach"]
CONFIG = {
    "model": {
        "class_path": "lit_personalize.objectives.denoising.Denoising",
        "init_args": {
            "base": "/secret/place", "seed": 3, "snr_gamma": None,
            "adapters": [{"class_path": "a.b.LoRA", "init_args": {"rank": 2, "alpha": None, "name": "lora"}}],
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001, "amsgrad": False}},
        },
    },
    "data": {"class_path": "x.Data", "init_args": {"batch_size": 4, "resolution": 32}},
    "trainer": {"max_steps": 7},
}  # fmt: skip


def _run(
    folder: Path, tiny: Path, train: Train, formats: list[str]
) -> tuple[RunDirectory, Base, AdapterWeights, list[Exported], list[Adapter]]:
    adapters: list[Adapter] = [LoRA(rank=2, alpha=4.0, text_encoder=True), TokenEmbedding("<new1>", "cat", vectors=2)]
    base, weights = train(tiny, adapters)
    run = RunDirectory(folder, "my run").create()
    return run, base, weights, export(weights, run.exports, base, run.name, formats), adapters


@pytest.mark.parametrize(("family", "formats"), [("sd1", ["diffusers"]), ("sdxl", ["diffusers"])])
def test_the_snippet_draws_the_trained_picture(
    tiny_bases: dict[str, Path], train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str,
    formats: list[str],
) -> None:  # fmt: skip
    run, base, _, files, adapters = _run(tmp_path, tiny_bases[family], train, formats)
    monkeypatch.chdir(run.path)
    names: dict[str, object] = {}
    exec(loading_snippet(base, files).replace("BASE", str(tiny_bases[family])), names)  # noqa: S102 - our own text
    pipe = names["pipe"]
    pipe.scheduler = stock_pipeline(base).scheduler  # type: ignore[attr-defined]
    side = base.resolution
    stock = pipe(  # type: ignore[operator]
        "a <new1> cat", negative_prompt="", num_inference_steps=3, guidance_scale=3.0, height=side, width=side,
        latents=start_noise(base, [0]), output_type="np",
    ).images[0]  # fmt: skip
    ours = generate(base, ["a <new1> cat"], [0], adapters, SamplingOptions(steps=3, guidance=3.0))[0]
    assert np.abs(np.round(stock * 255) - ours).max() <= 1
    untouched = generate(base, ["a cat"], [0], None, SamplingOptions(steps=3, guidance=3.0))[0]
    assert np.abs(untouched.astype(int) - ours).max() > 1


@pytest.mark.parametrize("formats", [["peft"], ["pipeline"]])
def test_the_snippet_loads_what_is_no_lora(
    tiny_bases: dict[str, Path], train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, formats: list[str]
) -> None:
    adapter = OFT()
    base, weights = train(tiny_bases["sd1"], [adapter])
    run = RunDirectory(tmp_path, "run").create()
    files = export(weights, run.exports, base, run.name, formats)
    monkeypatch.chdir(run.path)
    names: dict[str, object] = {}
    exec(loading_snippet(base, files).replace("BASE", str(tiny_bases["sd1"])), names)  # noqa: S102 - our own text
    pipe = names["pipe"]
    pipe.scheduler = stock_pipeline(base).scheduler  # type: ignore[attr-defined]
    stock = pipe(  # type: ignore[operator]
        "a cat", num_inference_steps=3, guidance_scale=3.0, height=base.resolution, width=base.resolution,
        latents=start_noise(base, [0]), output_type="np",
    ).images[0]  # fmt: skip
    ours = generate(base, ["a cat"], [0], [adapter], SamplingOptions(steps=3, guidance=3.0))[0]
    assert np.abs(np.round(stock * 255) - ours).max() <= 1


def test_the_snippet_names_both_rows_where_there_is_no_pair(
    tiny_bases: dict[str, Path], train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, base, weights, files, _ = _run(tmp_path, tiny_bases["sdxl"], train, ["kohya"])
    monkeypatch.chdir(run.path)
    names: dict[str, object] = {}
    exec(loading_snippet(base, files).replace("BASE", str(tiny_bases["sdxl"])), names)  # noqa: S102 - our own text
    pipe = names["pipe"]
    ids = pipe.tokenizer_2.convert_tokens_to_ids(["<new1>", "<new1>_1"])  # type: ignore[attr-defined]
    placed = pipe.text_encoder_2.get_input_embeddings().weight[ids]  # type: ignore[attr-defined]
    assert np.array_equal(placed.detach().numpy(), weights.tokens["<new1>"][1].numpy())


def test_the_card_says_what_was_done(tiny_bases: dict[str, Path], train: Train, tmp_path: Path) -> None:
    run, base, weights, files, _ = _run(tmp_path, tiny_bases["sd1"], train, ["diffusers", "peft"])
    run.config.write_text(yaml.safe_dump(CONFIG))
    run.metrics.write_text("epoch,loss,step\n0,0.5,1\n0,,1\n0,0.3,2\n")
    figures = {"clip_t": {"value": 0.31, "oracle": None, "floor": 0.2, "n": 4, "model": "clip"}}
    (run.path / EVALUATION).write_text(json.dumps({"figures": figures}))
    for step in (0, 7):
        folder = run.samples / f"step-{step:08d}"
        folder.mkdir()
        record = {
            "step": step,
            "prompts": PROMPTS,
            "seeds": [5, 6],
            "pictures": ["0_5.png", "0_6.png", "1_5.png", "1_6.png"],
        }
        (folder / "samples.json").write_text(json.dumps(record))
        for name in record["pictures"]:  # type: ignore[attr-defined]
            Image.new("RGB", (8, 8)).save(folder / name)
    Image.new("RGB", (20, 10)).save(run.samples / "grid.png")
    report = verify(files, base, weights, PROMPTS[1])
    text = write_card(run, base, weights, files, PROMPTS, report, "cc-by-4.0").read_text()
    _, front, body = text.split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["base_model"] == "sd1" and head["license"] == "cc-by-4.0" and head["library_name"] == "diffusers"
    assert head["instance_prompt"] == PROMPTS[1] and {"lora", "textual_inversion"} <= set(head["tags"])
    assert [w["text"] for w in head["widget"]] == PROMPTS
    assert [w["output"]["url"] for w in head["widget"]] == [
        "samples/step-00000007/0_5.png",
        "samples/step-00000007/1_5.png",
    ]
    assert all((run.path / w["output"]["url"]).is_file() for w in head["widget"])
    assert "`LoRA(rank=2)`" in body and "`AdamW(lr=0.001)`" in body and "| steps | 7 |" in body
    assert "/secret/place" not in text and str(tiny_bases["sd1"]) not in text and os.sep + "tmp" not in text
    assert "| loss, mean of the last 2 records | 0.4000 |" in body and "| clip_t | 0.3100 |  | 0.2000 |" in body
    for item in files:
        assert f"`exports/{item.name}`" in body and (run.exports / item.name).exists()
    assert "not checked" not in body and "`<new1>`" in body
    assert "\nTrained with" in body and "| method |" not in body
    (run.path / EVALUATION).unlink()
    run.write_env("dreambooth_lora")
    named = write_card(run, base, weights, files, PROMPTS, report).read_text()
    assert "DreamBooth with LoRA, trained with" in named and "| method | DreamBooth with LoRA |" in named
    (run.path / EVALUATION).write_text("[]")
    with pytest.raises(DataError, match="not a report"):
        write_card(run, base, weights, files, PROMPTS, report)


def test_the_recipe_changes_its_digest_with_any_key(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(CONFIG))
    rows = dict(recipe_rows(file))
    assert rows["objective"] == "`Denoising`" and rows["seed"] == "3" and "snr_gamma" not in rows
    file.write_text(yaml.safe_dump(CONFIG | {"name": "other"}))
    assert dict(recipe_rows(file))["configuration"] != rows["configuration"]
