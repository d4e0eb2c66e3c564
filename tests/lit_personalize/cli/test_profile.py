"""`litp profile step` on real steps of a tiny base; layer times against layers of known length."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch.autograd import DeviceType

from lit_callbacks.step_profile import operators_of
from lit_personalize.cli.main import main
from lit_personalize.report.layer_times import Clock, LayerTimes


class Hours(Clock):
    """A clock that only layers move on: what they take does not hang on what else the machine does."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.now = 0.0

    def stamp(self) -> float:
        return self.now


class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, clock: Hours, forward: float, backward: float) -> torch.Tensor:
        ctx.clock, ctx.backward_s = clock, backward
        clock.now += forward
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.clock.now += ctx.backward_s
        return gradient, None, None, None


class Layer(torch.nn.Module):
    def __init__(self, clock: Hours, forward: float, backward: float):
        super().__init__()
        self.takes = (clock, forward, backward)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Slow.apply(x, *self.takes)


@pytest.mark.parametrize("learns", [True, False])
def test_layers_take_the_time_that_they_take(learns: bool) -> None:
    """Two of one kind around one of another, each with its own length; the first may have no input that learns."""
    clock = Hours()
    first, middle, last = Layer(clock, 0.01, 0.02), Layer(clock, 0.06, 0.03), Layer(clock, 0.02, 0.04)
    times = LayerTimes({"ends": [first, last], "middle": [middle]}, clock)
    weight = torch.ones(2, requires_grad=True)
    for active in (False, True, True):
        times.active = active
        x = weight * 1 if learns else torch.ones(2)
        loss = last(middle(first(x) * weight)).sum()
        times.in_backward = True
        loss.backward()
        times.finish_backward()
        times.in_backward = False
        clock.now += 7
    found = {row.pop("name"): row for row in times.totals(2)}
    assert list(found) == ["ends", "middle"]
    assert found["ends"]["forward_ms"] == pytest.approx(30) and found["middle"]["forward_ms"] == pytest.approx(60)
    assert found["ends"]["backward_ms"] == pytest.approx(60 if learns else 40)
    assert found["middle"]["backward_ms"] == pytest.approx(30)


def test_a_kernels_time_counts_once() -> None:
    """On a GPU the profiler gives it to the operator and to the kernel; on a CPU there are operators alone."""
    kinds = {"aten::mm": (DeviceType.CPU, 5.0, 3000.0), "gemm": (DeviceType.CUDA, 0.0, 3000.0)}
    kinds["aten::add"] = (DeviceType.CPU, 15.0, 1000.0)
    events = [
        SimpleNamespace(key=key, count=4, device_type=kind, self_cpu_time_total=cpu, self_device_time_total=gpu)
        for key, (kind, cpu, gpu) in kinds.items()
    ]
    rows, own = operators_of(events, 2, cuda=True)
    assert own == 2.0 and [(row["name"], row["own_ms"], row["share"]) for row in rows] == [
        ("aten::mm", 1.5, 0.75), ("aten::add", 0.5, 0.25),
    ]  # fmt: skip
    assert [row["name"] for row in operators_of(events, 2, cuda=False)[0]] == ["aten::add", "aten::mm"]


def profile(
    workplace: Path, base: Path, capsys: pytest.CaptureFixture[str], *options: str, ends: int = 0
) -> dict[str, Any]:
    config = {
        "name": "cat",
        "model": {"class_path": "Denoising", "init_args": {"base": str(base), "adapters": [{"class_path": "LoRA"}]}},
        "data": {
            "class_path": "PersonalizationData",
            "init_args": {
                "resolution": 32,
                "batch_size": 2,
                "concepts": [{"path": "photos", "class_noun": "cat", "prompt": "a {class}"}],
            },
        },
        "trainer": {"max_steps": 500, "accelerator": "cpu", "devices": 1},
    }
    (workplace / "run.yaml").write_text(json.dumps(config))
    assert main(["profile", "step", "--steps", "3", "--json", "-c", "run.yaml", *options]) == ends
    report: dict[str, Any] = json.loads(capsys.readouterr().out or "{}")
    return report


def test_an_interrupted_profile_writes_nothing(
    workplace: Path, tiny_bases: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C has its own exit code; Lightning would end the process with 1."""

    def stopped(self: Any, *arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lit_callbacks.step_profile.StepProfile.on_train_batch_start", stopped)
    assert profile(workplace, tiny_bases["sd1"], capsys, ends=130) == {}
    assert not list(workplace.rglob("step.*"))


@pytest.mark.parametrize(
    "options",
    [[], ["--model.gradient_checkpointing=true", "--model.kernels=fallback", "--trainer.accumulate_grad_batches=2"]],
    ids=["plain", "checkpointed"],
)
def test_a_step_is_taken_apart(
    workplace: Path, tiny_bases: dict[str, Path], capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    report = profile(workplace, tiny_bases["sd1"], capsys, *options)
    folder = workplace / "runs/cat"
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {
        "profile/step.json", "profile/step.png", "profile/trace.json.gz",
    }  # fmt: skip
    assert json.loads((folder / "profile/step.json").read_text()) == report
    phases = report["phases_ms"]
    assert list(phases) == ["data", "forward", "backward", "optimizer"] and min(phases.values()) > 0
    assert report["step_ms"]["p10"] <= report["step_ms"]["median"] <= report["step_ms"]["p90"]
    for kind in ("parts", "kinds"):
        assert 0 < sum(row["forward_ms"] for row in report[kind]) <= phases["forward"]
        assert 0 < sum(row["backward_ms"] for row in report[kind]) <= phases["backward"]
    assert {row["name"] for row in report["kinds"]} == {
        "resnets", "self-attention", "cross-attention", "feed-forward", "resampling",
    }  # fmt: skip
    assert sum(row["share"] for row in report["operators"]) == pytest.approx(1)
    assert "aten::mm" in {row["name"] for row in report["operators"]}
    assert report["gpu_busy_ms"] is None and report["launch_bound"] is None and report["device"] == "CPU"
    trace = json.loads(gzip.decompress((folder / "profile/trace.json.gz").read_bytes()))
    assert sum(event.get("name") == "aten::mm" for event in trace["traceEvents"]) > 10
    assert Image.open(folder / "profile/step.png").size == (1100, 900)


def test_wrong_options_are_named(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "step", "--steps", "1"]) == 2
    assert "--steps must be at least 2, not 1" in capsys.readouterr().err
    assert main(["profile", "step", "--trainer.max_stepz=3"]) == 2
    assert "max_steps" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["profile", "compile", "--trainer.max_steps=3"])
    assert "unrecognized arguments: --trainer.max_steps=3" in capsys.readouterr().err
