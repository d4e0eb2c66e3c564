"""Baselines compute what the operators compute: results and gradients, at small sizes on a CPU."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_kernels import measuring
from lit_kernels.baselines import Baseline, baselines_of
from lit_personalize.report import roofline

CPU = torch.device("cpu")
SMALL = {"small": {"text": 16, "layers": [(16, 2, 6, 1)]}}
BANK = {"adapters": 3, "width": 16, "tokens": 4, "parameters": 40}
PEFT = {"peft autocast", "peft casts off"}
NAMES = {
    "text_kv": PEFT, "bank_lora": PEFT, "frozen_geglu": {"diffusers"}, "absorbed_attention": set(),
    "short_key_attention": {"SDPA flash", "SDPA cudnn", "SDPA efficient", "SDPA math"}, "bank_adamw": {"AdamW"},
}  # fmt: skip


def cases(dtype: torch.dtype) -> list[measuring.Case]:
    return list(measuring.cases(1, dtype, SMALL, BANK))


def flat(tensors: Any) -> Tensor:
    """One tensor or many, whether they are stacks or parts."""
    found = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    return torch.cat([x.detach().float().flatten() for x in found])


def passes(way: Baseline) -> list[Tensor]:
    """The result and all gradients, of gradients from the outside that are not all alike."""
    out = way.run()
    outs = [out] if isinstance(out, Tensor) else list(out)
    if not way.learning:
        return [flat(outs)]
    grads = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y) for y in outs]
    return [flat(outs), flat(torch.autograd.grad(outs, way.learning, grads))]


def named(case: measuring.Case) -> str:
    return f"{case.operator} {case.size}"


@pytest.mark.parametrize("case", cases(torch.float32), ids=named)
def test_every_baseline_computes_the_same(case: measuring.Case) -> None:
    torch.manual_seed(0)
    built = case.build(CPU)
    ways = baselines_of(case.operator, built.given, compiler="aot_eager")
    assert set(ways) == NAMES[case.operator] | {"compiled", "graph"}
    made = {name: make() for name, make in ways.items()}  # before ours, which changes weights in place (AdamW)
    ours = passes(Baseline(lambda: built.run("reference"), built.learning))
    compared = set()
    for name, way in made.items():
        try:
            found = passes(way)
        except RuntimeError as error:
            assert name in ("SDPA cudnn", "SDPA efficient", "SDPA flash"), f"{name}: {error}"
            continue
        compared.add(name)
        for part, expected, value in zip(("result", "gradients"), ours, found, strict=False):
            torch.testing.assert_close(value, expected, rtol=2e-5, atol=2e-5, msg=f"{name}: {part}")
        assert len(found) == len(ours)
    assert set(ways) - compared <= {"SDPA cudnn", "SDPA efficient"}


@pytest.mark.parametrize("operator", ["text_kv", "bank_lora"])
def test_autocast_leaves_factors_in_fp32_and_computes_in_bf16(operator: str) -> None:
    torch.manual_seed(0)
    built = next(case for case in cases(torch.bfloat16) if case.operator == operator).build(CPU)
    ways = baselines_of(operator, built.given)
    autocast, casts_off = ways["peft autocast"](), ways["peft casts off"]()
    assert autocast.learning[-1].dtype == torch.float32 and casts_off.learning[-1].dtype == torch.bfloat16
    assert flat(autocast.run()).shape == flat(built.run("fallback")).shape
    ours = passes(Baseline(lambda: built.run("fallback"), built.learning))
    for way in (autocast, casts_off):
        for expected, found in zip(ours, passes(way), strict=True):
            assert (found - expected).norm() <= 0.02 * expected.norm()


def test_what_cannot_run_is_written_down_and_ratios_are_those_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "baselines_of", functools.partial(baselines_of, compiler="aot_eager"))
    case = next(case for case in cases(torch.float16) if case.operator == "short_key_attention")
    ticks = iter(range(1, 1000))
    found = measuring.times_of(case, CPU, lambda run: (run(), float(next(ticks)))[1])
    assert found["triton"] == {"forward": 1, "backward": 2} and found["fallback"] == {"forward": 3, "backward": 4}
    reasons = {name: why for name, why in found.items() if isinstance(why, str)}
    assert "SDPA cudnn" in reasons and reasons["SDPA cudnn"].startswith("RuntimeError: ")
    monkeypatch.setattr(measuring, "times_of", lambda *given: found)
    monkeypatch.setattr(measuring, "peaks_of", lambda device: ("H200", 1.0, 1.0))
    forward, backward = measuring.measure([case], CPU)
    assert forward.time_us == 1 and backward.time_us == 2 and forward.ratio == 3
    math = found["SDPA math"]
    assert isinstance(math, dict) and backward.ratios["SDPA math"] == math["backward"] / 2
    assert forward.ratios["best SDPA"] == min(r for name, r in forward.ratios.items() if name.startswith("SDPA"))
    report = {"device": "GPU", "limit_of": "H200", "operators": measuring.as_rows([forward, backward])}
    text = roofline.table(report)
    assert f"SDPA math {forward.ratios['SDPA math']:.2f}" in text and "    SDPA cudnn: RuntimeError: " in text
    assert "best SDPA" in text and report["operators"][0]["baselines"]["SDPA cudnn"] == reasons["SDPA cudnn"]
