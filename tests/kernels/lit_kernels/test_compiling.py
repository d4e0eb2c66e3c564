"""The compile gate: every form of every kernel, for sm_80 and sm_90, on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_kernels import compiling
from lit_kernels.compiling import ARCHITECTURES, OPERATORS, Shipped, as_dict, compile_all, results_name, shipped
from lit_kernels.dispatch import padded_rank
from lit_kernels.text_kv.function import MAX_RANK
from lit_personalize.cli.main import main

RESULTS = Path(__file__).parents[3] / "kernels/benchmarks/results"


def test_every_form_compiles_to_what_is_recorded(tmp_path: Path) -> None:
    """No spills, shared memory within the limit, tensor cores; and the figures in `results`, for the same compiler."""
    made = list(compile_all(jobs=2))
    assert len(list(shipped())) <= 60 and len(made) == len(list(shipped())) * len(ARCHITECTURES)
    assert [(one.name, one.config, one.arch, one.faults) for one in made if one.faults] == []
    recorded = RESULTS / results_name()
    if recorded.exists():
        again = f"litp profile compile --out {RESULTS.relative_to(RESULTS.parents[2])}"
        assert as_dict(made) == json.loads(recorded.read_text()), f"look at what changed, then write it anew: {again}"


def test_the_tightest_forms_compile_in_fp16_too() -> None:
    """On sm_80, of each kernel the form that leaves no register free in bf16; `results` has all of them."""
    recorded = json.loads(sorted(RESULTS.glob("compile-triton-*.json"))[-1].read_text())["kernels"]
    tight = [(k["name"], k["config"]) for k in recorded if k["arch"] == "sm_80" and k["registers"] == 255]
    chosen = [(form.name, form.config) for form in shipped()]
    code = (
        "import json, sys; from lit_kernels.compiling import compile_for, shipped\n"
        "forms = list(shipped())\n"
        "for i in map(int, sys.argv[1:]):\n"
        "    made = compile_for(forms[i].of('fp16'), 80); print(json.dumps([made.name, made.faults]))"
    )
    one_each = {name: chosen.index((name, config)) for name, config in tight}
    assert {"text_kv_forward", "short_key_forward", "short_key_backward"} <= one_each.keys()
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, one_each.values())],
        capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}, timeout=200,
    )  # fmt: skip
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[name, []] for name in one_each], done.stderr


def test_a_form_in_fp16_is_another_form() -> None:
    form = next(iter(shipped(["text_kv"])))
    assert form.signature["x"] == "*bf16" and form.of("fp16").signature["x"] == "*fp16"
    assert form.of("fp16").signature["down"] == "*fp32" and form.of("bf16") == form


@pytest.mark.parametrize("dtype", ["", "fp16-"])
def test_results_of_some_compiler_are_recorded(dtype: str) -> None:
    files = sorted(RESULTS.glob(f"compile-{dtype}triton-*.json"))
    assert files
    for file in files:
        kernels = json.loads(file.read_text())["kernels"]
        assert {(k["name"], k["config"]) for k in kernels} == {(f.name, f.config) for f in shipped()}
        assert not any(k["spills"] or k["faults"] for k in kernels)


@pytest.mark.parametrize("form", list(shipped()), ids=lambda form: f"{form.name} {form.config}")
def test_forms_name_the_arguments_of_their_kernel(form: Shipped) -> None:
    assert list(form.signature) == list(form.kernel.arg_names)
    assert set(form.constants) == {name for name, kind in form.signature.items() if kind == "constexpr"}
    assert set(form.divisible) <= set(form.signature) - set(form.constants)


def test_every_rank_runs_as_a_form_that_is_compiled() -> None:
    padded = {form.constants["RANK_PAD"] for form in shipped() if "RANK_PAD" in form.constants}
    assert {padded_rank(rank) for rank in range(1, MAX_RANK + 1)} == padded
    assert all(padded_rank(rank) >= rank for rank in range(1, MAX_RANK + 1))


def test_a_form_that_spills_is_a_fault() -> None:
    """128x128 with rank 64, which `config_for` avoids, spills on sm_90."""
    code = (
        "from dataclasses import replace; from lit_kernels.compiling import compile_for, shipped\n"
        "form = next(f for f in shipped(['text_kv']) if f.config == '128x128x64 rank 8')\n"
        "bad = replace(form, constants={**form.constants, 'RANK': 64, 'RANK_PAD': 64})\n"
        "print(compile_for(form, 90).faults, compile_for(bad, 90).faults)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=200)
    assert done.stdout.startswith("[] ['spills "), done.stdout + done.stderr


def test_the_verb_prints_a_table_or_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given = ["profile", "compile", "--only", "text_kv", "--arch", "80"]
    assert main([*given, "--json", "--out", str(tmp_path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((tmp_path / results_name()).read_text())
    asked = {"name", "arch", "config", "registers", "spills", "shared_bytes", "tensor_core_instructions"}
    assert all(asked <= kernel.keys() for kernel in told["kernels"])
    assert {kernel["arch"] for kernel in told["kernels"]} == {"sm_80"}


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--arch", "75"], "unknown architecture 75; there are 80, 90"),
        (["--only", "flash"], f"unknown operator 'flash'; there are {', '.join(OPERATORS)}"),
    ],
)
def test_the_verb_says_what_there_is(option: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "compile", *option]) == 2
    assert said in capsys.readouterr().err


def test_occupancy_is_that_of_the_tables() -> None:
    """By hand: 128 registers x 32 lanes are 4096 a warp, so 16 warps; 59,392 bytes leave room for 3 programs of 4."""
    assert compiling._warps_per_sm(80, 4, 128, 32768) == 16
    assert compiling._warps_per_sm(90, 4, 98, 59392) == 12
    assert compiling._warps_per_sm(90, 8, 32, 0) == 64
