"""Pivotal Tuning from `litp init` to verified files: resumed across its pivot, read by the stock client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lit_personalize import checkpoints
from lit_personalize.adapters.loaded import LoadedAdapter
from lit_personalize.backbones.loading import load_base
from lit_personalize.cli.main import main
from lit_personalize.export.loading import read_adapter
from lit_personalize.export.stock import stock_pipeline

STEPS = 4
FIT = [
    "fit", "-c", "run.yaml", "--data.init_args.resolution", "32", "--data.init_args.batch_size", "1",
    "--trainer.accumulate_grad_batches", "1", "--trainer.max_steps", str(STEPS), "--checkpoint.every", "1",
    "--checkpoint.keep_last", str(STEPS), "--model.init_args.dtype", "float32", "--sampling.prompts", "[]",
]  # fmt: skip


def config(base: Path, *more: str) -> dict[str, Any]:
    given = ["--images", "photos", "--class-noun", "cat", "--base", str(base), "--name", "run", *more]
    assert main(["init", "--method", "pivotal_tuning", *given]) == 0
    return dict(yaml.safe_load(Path("run.yaml").read_text()))


def fit(root: str, *more: str, stop_at: int | None = None) -> None:
    """Train, or begin to: the run is interrupted in step `stop_at`."""
    stop = [] if stop_at is None else [
        "--allow", "interrupt_at", "--trainer.callbacks",
        json.dumps([{"class_path": "interrupt_at.InterruptAt", "init_args": {"step": stop_at}}]),
    ]  # fmt: skip
    assert main([*FIT, *more, *stop, "--root", root]) == (0 if stop_at is None else 130)


def trained(root: str, step: int) -> dict[str, torch.Tensor]:
    """All factors of a checkpoint."""
    return checkpoints.load_state(checkpoints.directory(Path(root, "run", "checkpoints"), step))


@pytest.mark.parametrize(("family", "two_stages", "stops"), [("sdxl", False, (0, 2)), ("sd1", True, (1,))])
def test_resumed_across_the_pivot(
    tiny_bases: dict[str, Path], workplace: Path, monkeypatch: pytest.MonkeyPatch, family: str, two_stages: bool,
    stops: tuple[int, ...],
) -> None:  # fmt: skip
    """Interrupted before, at and behind the pivot (step 2 of 4) or not: every factor of every step is the same."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    written = config(tiny_bases[family])
    if two_stages:
        written["model"]["init_args"]["adapters"][1]["init_args"]["span"] = [0.5, 1]
        Path("run.yaml").write_text(yaml.safe_dump(written))
    fit("straight", "--export.verify", "false")
    for stop in stops:
        fit("parted", stop_at=stop)
    fit("parted")
    report = json.loads(Path("parted/run/exports/verify.json").read_text())
    assert report["picture_difference"] <= 1 / 255 + 1e-6
    assert {f["kind"] for f in report["files"]} == {"diffusers", "kohya", "embedding"}

    found = [trained("straight", step) for step in range(1, STEPS + 1)]
    for step, factors in enumerate(found, 1):
        other = trained("parted", step)
        assert factors.keys() == other.keys() and all(v.equal(other[name]) for name, v in factors.items()), step
    rows = [n for n in found[0] if n.startswith("adapters.0")]
    assert len(rows) == (2 if family == "sdxl" else 1)
    for name in rows:
        assert not found[0][name].equal(found[1][name])
        assert found[1][name].equal(found[2][name]) and found[1][name].equal(found[3][name])
    ups = [n for n in found[0] if n.endswith(":B")]
    assert ups and all(bool(found[1][n].any()) != two_stages and bool(found[3][n].any()) for n in ups)
    for file in Path("straight/run/exports").glob("*.safetensors"):
        own, other = load_file(file), load_file(Path("parted/run/exports", file.name))
        assert own.keys() == other.keys() and all(v.equal(other[k]) for k, v in own.items()), file.name


def test_the_stock_client_encodes_prompts_as_trained(tiny_bases: dict[str, Path], workplace: Path) -> None:
    """`<s0>` and `<s1>` in both encoders from one file with clip_l and clip_g, by the lines of the card."""
    written = config(tiny_bases["sdxl"])
    rows, lora = written["model"]["init_args"]["adapters"]
    assert rows["init_args"]["token"] == "<s0><s1>" == written["data"]["init_args"]["concepts"][0]["token"]
    assert rows["init_args"]["span"] == [0, 0.5] and lora["class_path"] == "LoRA"
    fit("runs", "--export.verify", "false", "--trainer.max_steps", "2", "--model.init_args.optimizer.init_args.lr", "1")
    exports = Path("runs/run/exports")
    state = load_file(exports / "learned_embeds.safetensors")
    assert {name: tuple(t.shape) for name, t in state.items()} == {"clip_l": (2, 32), "clip_g": (2, 48)}
    base = load_base(tiny_bases["sdxl"])
    LoadedAdapter(read_adapter(exports / "learned_embeds.safetensors", base)).attach(base)
    pipe = stock_pipeline(base)
    pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id
    card = Path("runs/run/README.md").read_text()
    lines = [line for line in card.splitlines() if line.startswith(("rows = ", "pipe.load_textual_inversion"))]
    assert len(lines) == 3
    code = "\n".join(lines).replace('"exports/', f'"{exports}/')
    exec(code, {"pipe": pipe, "load_file": load_file})
    prompt = "a photo of <s0><s1> cat, <s0><s1>"
    with torch.no_grad():
        told = base.condition([prompt])
        states, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
    assert told.pooled is not None
    torch.testing.assert_close(told.states, states, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(told.pooled, pooled, atol=1e-6, rtol=1e-5)
    plain = pipe.encode_prompt("a photo of cat, ", do_classifier_free_guidance=False)[0]
    assert not torch.allclose(plain, states)


def test_another_name_is_one_row(tiny_bases: dict[str, Path], workplace: Path) -> None:
    written = config(tiny_bases["sd1"], "--token", "<toy>")
    assert written["model"]["init_args"]["adapters"][0]["init_args"]["token"] == "<toy>"
