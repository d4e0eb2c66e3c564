"""`litp profile kernels`: what is said of an operator is what it does, and nothing is timed where nothing can be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lit_kernels import measuring
from lit_kernels.compiling import OPERATORS
from lit_personalize.cli.main import main

CASES = list(measuring.cases(batch=2))


def test_every_operator_is_measured() -> None:
    assert {case.operator for case in CASES} == set(OPERATORS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operator} {case.size}")
def test_flops_are_those_that_torch_counts(case: measuring.Case) -> None:
    """On the meta device, of plain torch; attention there is two products forward and four backward, ours is five."""
    built = case.build(torch.device("meta"))
    # Where a layer is not absorbed it is computed as it is, which is another sum.
    plain = "reference" if case.operator == "absorbed_attention" else "fallback"
    with FlopCounterMode(display=False) as forward:
        out = built.run(plain)
    if case.operator in ("bank_adamw", "frozen_geglu"):
        assert forward.get_total_flops() == 0, "there is no product in it"
        return
    assert forward.get_total_flops() == case.flops
    if not built.learning:
        return
    outs = [out] if isinstance(out, Tensor) else list(out)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(outs, built.learning, [torch.ones_like(y) for y in outs])
    share = 4 / 5 if case.operator == "short_key_attention" else 1
    assert backward.get_total_flops() == share * case.backward_flops


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and times are measured")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "kernels", "--only", "text_kv", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "no GPU here: nothing was timed; limits are modelled from H200's peaks" in text
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert report["device"] is None and {row["operator"] for row in report["operators"]} == {"text_kv"}
    assert all(row["time_us"] is None and row["ratio"] is None for row in report["operators"])
    # By hand: SDXL's 140 slices are 166,400 columns of 2,048 in bf16, 682 MB that have to be read: 158 us at 4.3 TB/s.
    (forward,) = (r for r in report["operators"] if r["size"].startswith("sdxl") and r["direction"] == "forward")
    assert forward["limited_by"] == "memory" and 158 < forward["limit_us"] < 170
    assert Image.open(tmp_path / "kernels.png").size == (900, 550)


def test_wrong_options_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "kernels", "--only", "flash"]) == 2
    assert "unknown operator 'flash'; there are text_kv, short_key_attention" in capsys.readouterr().err
    assert main(["profile", "kernels", "--batch", "0"]) == 2
    assert "--batch must be at least 1, not 0" in capsys.readouterr().err
