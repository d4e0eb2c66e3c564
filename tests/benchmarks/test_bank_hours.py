"""The benchmark of the bank's hours runs whole on a small base, and what it concludes follows from what it measured."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MEASURED = ("seconds per step", "start-up seconds", "peak GB", "peak GB reserved")
CONCLUDED = (
    "extrapolated seconds per adapter", "extrapolated adapters per hour", "extrapolated GPU-hours of the corpus",
    "times the limit", "gain over stock", "peak GB",
)  # fmt: skip


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bank_hours

    return bank_hours


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bank_ways

    return bank_ways


def options(out: Path, base: Path | None, **changed: Any) -> argparse.Namespace:
    given = {"slots": [1, 2], "steps": 2, "warmup": 1, "rounds": 1, "limit": 280.0, "folder": None, **changed}
    return argparse.Namespace(out=out, base=base, **given)


def made_up(slots: int = 1, step: float = 0.02, start: float = 10.0, flop: int | None = None) -> dict[str, Any]:
    profile = {"busy ms per step": 1e3 * step / 2, "shares": {"attention": 0.25, "matrix products": 0.75}}
    counted = {} if flop is None else {"FLOP per step": flop}
    return {
        "device": "CPU", "slots": slots, "timed steps": 50, "seconds per step": step, "start-up seconds": start,
        "peak GB": 3.0, "profile": profile, **counted,
    }  # fmt: skip


@pytest.mark.timeout(900)
def test_every_way_has_every_figure(program: Any, tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "hours.json"
    printed = program.measure(options(out, tiny_base))
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report == printed and report["failed"] == {}
    expected = {"stock", "persistent eager", "bank 1", "bank 2"}
    if not torch.cuda.is_available():
        assert report["stopped"] == {"persistent compile+graph": "not measured here: a CUDA graph needs a GPU"}
    assert expected == set(report["measured"]) - {"persistent compile+graph"}
    for way in expected:
        [found] = report["measured"][way]
        assert all(found[name] > 0 for name in MEASURED), way
        assert found["timed steps"] == sum(1 for _ in found["seconds per step of blocks"]) == 2
        assert found["profile"]["busy ms per step"] > 0 and found["profile"]["longest, ms per step"]
        assert sum(found["profile"]["shares"].values()) == pytest.approx(1, abs=1e-3)
        assert all(found["profile"]["shares"][kind] > 0 for kind in ("attention", "convolutions", "matrix products"))
        concluded = report["summary"]["ways"][way]
        assert all(concluded[name] > 0 for name in CONCLUDED), way
        assert sum(concluded["where those hours go"].values()) == pytest.approx(
            concluded["extrapolated GPU-hours of the corpus"], rel=1e-3
        )
    assert report["measured"]["stock"][0]["seconds to encode a step's pictures and captions"] > 0
    before = out.read_bytes()
    program.measure(options(out, tiny_base))
    assert out.read_bytes() == before
    with pytest.raises(SystemExit, match="another timed steps"):
        program.measure(options(out, tiny_base, steps=3))


def test_hours_follow_from_steps(program: Any) -> None:
    flop = int(3.5e12)
    measured = {"stock": [made_up(flop=flop), made_up(step=0.04)], "bank 8": [made_up(8, 0.08, 99.0)]}
    report = {"measured": measured, "steps of an adapter": 800}
    found = program.summary(report)
    stock, bank = found["ways"]["stock"], found["ways"]["bank 8"]
    assert stock["extrapolated seconds per adapter"] == pytest.approx(800 * 0.03 + 10) and not stock["target reached"]
    assert bank["extrapolated seconds per adapter"] == pytest.approx(8) and bank["target reached"]
    assert bank["extrapolated adapters per hour"] == pytest.approx(450)
    assert bank["gain over stock"] == pytest.approx(34 / 8, rel=1e-4)
    hours, limit = program.CORPUS * 8 / 3600, program.CORPUS * 800 * flop / 790e12 / 3600
    assert bank["extrapolated GPU-hours of the corpus"] == pytest.approx(hours, rel=1e-4)
    assert found["limit, modelled"]["GPU-hours"] == pytest.approx(limit, rel=1e-4)
    assert bank["times the limit"] == pytest.approx(hours / limit, rel=1e-4)
    parts = {"attention": hours / 8, "matrix products": hours * 3 / 8, "idle": hours / 2, "start-up": 0}
    assert bank["where those hours go"] == pytest.approx(parts, rel=1e-4)
    assert stock["where those hours go"]["start-up"] == pytest.approx(program.CORPUS * 10 / 3600, rel=1e-4)
    assert str(800) in found["extrapolated"] and program.summary({**report, "measured": {}})["ways"] == {}


def test_what_ran_out_of_memory_stays_and_what_failed_is_tried_again(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    answers = {"bank 1": {"failed": "ended with 1"}, "bank 2": {"stopped": "out of memory"}}

    def run(way: str, *_: Any) -> dict[str, Any]:
        asked.append(way)
        return answers.get(way, made_up())

    monkeypatch.setattr(program, "run", run)
    given = options(tmp_path / "hours.json", tmp_path, rounds=2)
    report = program.measure(given)
    assert report["stopped"] == {"bank 2": "out of memory"} and report["failed"] == {"bank 1": "ended with 1"}
    ways = ["stock", "persistent eager", "persistent compile+graph"]
    assert asked == [*ways, "bank 1", "bank 2", *ways[::-1]]
    asked.clear()
    answers["bank 1"] = made_up()
    assert program.measure(given)["failed"] == {} and asked == ["bank 1", "bank 1"]


def test_too_little_memory_is_a_result(ways: Any) -> None:
    def run() -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    assert ways.guarded(run) == {"stopped": "out of memory: CUDA out of memory"}


def test_a_process_that_fails_says_why(program: Any, tmp_path: Path) -> None:
    found = program.run("bank 1", tmp_path / "nowhere", options(tmp_path, tmp_path))
    assert "nowhere" in found["failed"]


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas", "matrix products"),
        ("cutlass3x_sm90_tensorop_bf16_64x128x64_implicit_gemm_fprop", "convolutions"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", "attention"),
        ("void pytorch_flash::flash_bwd_convert_dq_kernel", "attention"),
        ("triton_poi_fused_convolution_silu_3", "everything else"),
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16>", "everything else"),
        ("Memcpy HtoD (Pageable -> Device)", "copies"),
        ("bank_lora_product", "matrix products"), ("short_key_backward", "attention"),
    ],
)  # fmt: skip
def test_kernels_are_known_by_their_names(ways: Any, kernel: str, kind: str) -> None:
    found = ways.shares({kernel: 3.0, "other": 1.0})
    assert found[kind] == (1.0 if kind == "everything else" else 0.75)


def test_a_base_of_another_size_can_be_written_and_trained(ways: Any, tmp_path: Path) -> None:
    import full_base

    narrow = (32, 32, 32, 32)
    unet = {**full_base.unet_of_sd15(), "sample_size": 8, "block_out_channels": narrow, "cross_attention_dim": 32}
    vae = {**full_base.VAE, "block_out_channels": narrow}
    text = {**full_base.TEXT, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    full_base.write_base(tmp_path, torch.bfloat16, torch.device("cpu"), unet, vae, text)
    ways.bank(tmp_path, 2, torch.device("cpu"))()
    step, _ = ways.stock(tmp_path, torch.device("cpu"))
    step()


def test_a_real_size_is_refused_without_a_gpu(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bank_hours.py", "--out", str(tmp_path / "hours.json")])
    assert program.main() == 2 and re.search("needs a GPU", capsys.readouterr().err)
