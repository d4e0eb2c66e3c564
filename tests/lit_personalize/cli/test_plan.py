"""`litp plan` against what `litp fit` then does; all that it refuses; what would fit a card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_personalize import checkpoints
from lit_personalize.cli.main import main
from lit_personalize.tinyworld.dataset import sample_pictures, write_folder

TOKEN = {"class_path": "TokenEmbedding", "init_args": {"token": "<new1>", "init": "cat"}}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three photos in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    write_folder(sample_pictures(3, 1, kind="object"), tmp_path / "photos")
    for extra in [*(tmp_path / "photos").glob("*.txt"), *(tmp_path / "photos").glob("*.json")]:
        extra.unlink()
    return tmp_path


def write_run(base: Path, adapters: list[dict[str, Any]], **more: Any) -> str:
    concept = {"path": "photos", "class_noun": "cat", "token": "<new1>"}
    model = {"base": str(base), "adapters": adapters}
    data = {"concepts": [concept], "resolution": 32, "batch_size": 2}
    run = {
        "name": "planned",
        "model": {"class_path": "Denoising", "init_args": model},
        "data": {"class_path": "PersonalizationData", "init_args": data},
        "trainer": {"max_steps": 6, "accelerator": "cpu", "enable_progress_bar": False, "accumulate_grad_batches": 2},
        "checkpoint": {"every": 3, "keep_last": 1}, "export": {"formats": ["delta"], "verify": False},
    }  # fmt: skip
    for key, value in more.items():
        run[key] = {**run[key], **value} if isinstance(value, dict) and key in run else value
    Path("run.yaml").write_text(yaml.safe_dump(run))
    return "run.yaml"


def without_weights(base: Path, folder: Path) -> Path:
    return Path(shutil.copytree(base, folder / "configs", ignore=shutil.ignore_patterns("*.safetensors")))


def told(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    ended = main(["plan", "--json", *arguments])
    printed = capsys.readouterr()
    assert ended == code and printed.out, printed.err
    report: dict[str, Any] = json.loads(printed.out)
    return report


def test_a_plan_without_weights_says_what_fit_writes(
    tiny_bases: dict[str, Path], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = [{"class_path": "KeyValueDelta"}, TOKEN]
    report = told(capsys, "-c", write_run(without_weights(tiny_bases["sd1"], here), adapters))
    schedule = report["schedule"]
    assert schedule["optimizer_steps"] == 6 and schedule["instances_per_step"] == 4
    assert report["pictures"]["concepts"] == 3 and schedule["shown_per_picture"] == 8
    assert report["device"]["peak"] > report["device"]["saved"] > report["step"]["trained"] > 0
    assert not (here / "runs").exists(), "a plan writes nothing"
    assert main(["fit", "-c", write_run(tiny_bases["sd1"], adapters)]) == 0
    found = checkpoints.find_complete(here / "runs/planned/checkpoints")
    assert found is not None
    assert sum(t.nbytes for t in checkpoints.load_state(found.path).values()) == report["step"]["trained"]
    assert report["disk"]["checkpoint"] - 2**18 < checkpoints.size_of(found.path) <= report["disk"]["checkpoint"]
    exported = sum(file.stat().st_size for file in (here / "runs/planned/exports").glob("*.safetensors"))
    assert exported == pytest.approx(report["disk"]["exports"], rel=0.1)


def test_everything_that_is_refused_is_said_at_once(
    tiny_bases: dict[str, Path], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rotations = {"class_path": "OFT"}
    fsdp2 = {"data_parallel_size": 4, "tensor_parallel_size": 1}
    trainer = {
        "devices": 2,
        "strategy": {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy", "init_args": fsdp2},
    }
    run = write_run(
        without_weights(tiny_bases["sd1"], here), [rotations, TOKEN], trainer=trainer, ema=0.9, resume="must",
    )  # fmt: skip
    untold = ["--data.init_args.concepts", '[{"path": "photos", "class_noun": "cat"}]']
    reasons = "\n".join(told(capsys, "-c", run, *untold, code=2)["refused"])
    for reason in (
        "ema: ModelParallelStrategy keeps shares", "data_parallel_size is 4, and trainer.devices times",
        "OFT needs whole weights of the base", "token <new1> is trained, but no caption",
        "has no complete checkpoint to resume from",
    ):  # fmt: skip
        assert reason in reasons


def test_options_that_the_data_module_refuses_do_not_hide_the_rest(
    tiny_bases: dict[str, Path], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tiny_bases["sd1"], [{"class_path": "LoRA"}], resume="must")
    report = told(capsys, "-c", run, "--data.init_args.concepts", "[]", code=2)
    assert "concepts is empty" in report["refused"][0] and "no complete checkpoint" in report["refused"][1]
    assert report["step"]["saved"] > 0


def test_a_card_that_is_too_small_and_what_fits_it(
    tiny_bases: dict[str, Path], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tiny_bases["sd1"], [{"class_path": "LoRA"}], trainer={"accelerator": "auto"})
    first = told(capsys, "-c", run, "--memory", "0.001")
    assert first["fits"] is False and first["accelerator"] == "gpu"
    changes = {one["change"]: one for one in first["instead"]}
    peaks = [first["device"]["peak"], *(changes[c]["peak"] for c in ("bfloat16", "gradient checkpointing"))]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 3
    enough = (changes["bfloat16"]["peak"] + 1) / 1e9
    assert changes["FSDP2 on 16 GPUs"]["fits"] is False
    assert not [note for note in first["notes"] if "without fused kernels" in note and "not installed" not in note]
    assert main(["plan", "-c", run, "--memory", str(enough)]) == 0
    shown = capsys.readouterr().out
    assert "too small" in shown and "with bfloat16" in shown and "gradient checkpointing" not in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_a_probe_trains_here_and_leaves_nothing(
    tiny_bases: dict[str, Path], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tiny_bases["sd1"], [{"class_path": "LoRA"}])
    probe = told(capsys, "-c", run, "--probe", "3")["probe"]
    assert probe["steps"] == 3 and probe["step_seconds"] > 0 and probe["start_seconds"] > 0
    assert not (here / "runs").exists()
    assert main(["plan", "-c", run, "--probe", "1"]) == 2
    assert "at least 2 steps" in capsys.readouterr().err


def test_pictures_that_cannot_be_used_are_refused_and_missing_ones_are_not(
    tiny_bases: dict[str, Path], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = write_run(tiny_bases["sd1"], [TOKEN])
    (here / "photos/00001.png").write_bytes(b"no picture")
    report = told(capsys, "-c", written, code=2)
    assert any("00001.png" in reason for reason in report["refused"]) and not report["notes"]
    shutil.rmtree(here / "photos")
    report = told(capsys, "-c", written)
    assert not report["refused"] and any("not counted" in note for note in report["notes"])
