"""Tuning: the fastest tile and path are kept, what was measured stays, and every tile computes the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from lit_kernels import dispatch, measuring, table_files
from lit_kernels.compiling import shipped
from lit_kernels.tuning import key_of, tune
from lit_personalize.cli.main import main

GPU = "Test GPU"
CPU = torch.device("cpu")
SMALL = {"small": {"text": 16, "layers": [(16, 2, 24, 1)]}}
BANK = {"adapters": 2, "width": 16, "tokens": 4, "parameters": 40}


def case_of(operator: str, dtype: torch.dtype = torch.float16, models: Mapping[str, Any] = SMALL) -> measuring.Case:
    return next(case for case in measuring.cases(1, dtype, models, BANK) if case.operator == operator)


def by_hand(costs: Mapping[str, float], plain: float = 50.0, broken: str = "") -> Callable[..., float]:
    """A clock: 10 for a run, and what each tile that is forced costs; `plain` without a tile."""

    def bench(run: Callable[[], Any]) -> float:
        if dispatch._trial is None:
            run()
            return plain
        tiles = list(dispatch._trial.tiles.values())
        if broken and any(broken in tile for tile in tiles):
            raise OutOfResources(2, 1, "shared memory")
        return 10 + sum(costs.get(tile, 5.0) for tile in tiles)

    return bench


def tuned(file: Path, bench: Callable[..., float], *operators: str) -> list[table_files.Entry]:
    return list(tune([case_of(name) for name in operators], file, GPU, CPU, bench))


def test_the_fastest_tile_of_each_pass_and_the_faster_path(tmp_path: Path) -> None:
    file, fast = tmp_path / "t.json", "8x256x0, 4 warps, 3 stages"
    costs = {fast: 1.0, "128x64x64, 8 warps, 3 stages": 2.0, "64x128x64, 8 warps, 2 stages": 3.0}
    gate, text = tuned(file, by_hand(costs), "frozen_geglu", "text_kv")
    assert gate.tiles == {"forward": fast, "backward": fast}
    assert (gate.triton_us, gate.fallback_us, gate.path) == (12.0, 50.0, "triton")
    assert gate.tried_us["forward"] == {"4x256x0, 4 warps, 3 stages": 15.0, fast: 11.0}
    assert text.tiles == {"forward": "128x64x64, 8 warps, 3 stages", "backward": "64x128x64, 8 warps, 2 stages"}
    assert len(text.tried_us["forward"]) == 5 and len(text.tried_us["backward"]) == 3
    assert text.sizes == {"rank": 16, "rows": 77, "columns": 32} and text.dtype == "float16"
    slower = tuned(tmp_path / "slower.json", by_hand({}, plain=14.0), "frozen_geglu")
    assert slower[0].path == "fallback" and slower[0].triton_us == 20.0


def test_an_operator_without_gradients_or_without_tiles(tmp_path: Path) -> None:
    absorbed, adamw = tuned(tmp_path / "t.json", by_hand({}, plain=10.0), "absorbed_attention", "bank_adamw")
    assert absorbed.tiles.keys() == {"forward"} and adamw.tiles == {}
    assert (adamw.triton_us, adamw.path) == (10.0, "triton"), "as fast is not slower"
    assert adamw.sizes == {"adapters": 2, "parameters": 40} and adamw.dtype == "float32"


def test_a_tile_that_the_gpu_has_no_room_for_is_left_out(tmp_path: Path) -> None:
    (one,) = tuned(tmp_path / "one.json", by_hand({}, broken="8x256"), "frozen_geglu")
    assert one.tiles["forward"] == "4x256x0, 4 warps, 3 stages" and len(one.tried_us["forward"]) == 1
    (none,) = tuned(tmp_path / "none.json", by_hand({}, broken="x256"), "frozen_geglu")
    assert (none.path, none.triton_us, none.tiles) == ("fallback", None, {})
    assert table_files.read(tmp_path / "none.json") == [none]


def test_what_is_there_is_not_measured_again(tmp_path: Path) -> None:
    """The first run is interrupted in its second case."""
    file = tmp_path / "t.json"
    timed: list[str] = []

    def bench(run: Callable[[], Any]) -> float:
        if len(timed) == 7:
            raise KeyboardInterrupt
        timed.append("")
        return by_hand({})(run)

    with pytest.raises(KeyboardInterrupt):
        tuned(file, bench, "frozen_geglu", "bank_adamw")
    assert [entry.operator for entry in table_files.read(file)] == ["frozen_geglu"]
    assert list(tmp_path.iterdir()) == [file]
    timed[:] = [""] * 8

    def counted(run: Callable[[], Any]) -> float:
        timed.append("again")
        return by_hand({})(run)

    again = tuned(file, counted, "frozen_geglu", "bank_adamw")
    assert [entry.operator for entry in again] == ["bank_adamw"] and timed.count("again") == 2
    assert [entry.operator for entry in table_files.read(file)] == ["frozen_geglu", "bank_adamw"]
    assert tuned(file, by_hand({}), "frozen_geglu", "bank_adamw") == []


def tensors(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


@pytest.mark.parametrize(
    ("operator", "models"),
    [
        ("text_kv", SMALL),
        ("frozen_geglu", SMALL),
        ("absorbed_attention", SMALL),
        *(("short_key_attention", {"one": {"text": 8, "layers": [(w, 1, 40, 1)]}}) for w in (40, 64, 80, 160)),
    ],
)
def test_every_tile_that_is_offered_computes_the_same(
    operator: str, models: Mapping[str, Any], device: torch.device
) -> None:
    """fp16 beside the default tile, which other tests compare with the formula."""
    torch.manual_seed(3)
    built = case_of(operator, models=models).build(device)

    def passes(backend: str) -> list[Tensor]:
        outs = tensors(built.run(backend))
        grads = torch.autograd.grad(outs, built.learning, [torch.ones_like(y) for y in outs]) if built.learning else ()
        return [x.detach().double() for x in (*outs, *grads)]

    with dispatch.trying() as trial:
        default = passes("triton")
    assert {part for _, part in trial.offered} == ({"forward", "backward"} if built.learning else {"forward"})
    for (_, part), names in trial.offered.items():
        for name in names:
            with dispatch.trying({(operator, part): name}):
                found = passes("triton")
            for x, usual in zip(found, default, strict=True):
                assert (x - usual).abs().max() <= 3e-3 * usual.abs().max(), f"{part} {name}"


def test_every_tile_that_is_offered_is_one_that_the_compile_gate_sees() -> None:
    """By rows, columns, depth, warps and stages, of the kernel that takes it; for ranks up to 16, and above."""
    from lit_kernels.absorbed_attention.forward import tiles_for as absorbed
    from lit_kernels.short_key_attention.forward import BLOCKS
    from lit_kernels.short_key_attention.forward import tiles_for as short
    from lit_kernels.text_kv.backward import tiles_for as text_backward
    from lit_kernels.text_kv.forward import tiles_for as text

    half = torch.bfloat16
    sides = ("RANK_PAD", "WIDE", "BM", "BN")
    gate = {(form.name, *(form.constants.get(side) for side in sides), form.warps) for form in shipped()}
    for rank, pad in ((4, 16), (16, 16), (17, 64), (64, 64)):
        for rows in (1, 40, 77, 513, 5000):
            for c in text(rows, rank):
                assert ("text_kv_forward", pad, None, c.rows, c.columns, c.warps) in gate
        for period in (0, 77):
            for c in text_backward(rank, period):
                assert ("text_kv_backward", pad, None, c.rows, c.columns, c.warps) in gate
    for blocks in BLOCKS.values():
        for one in short(blocks):
            assert ("short_key_forward", None, blocks[0], one.rows, None, one.warps) in gate
    for keys in (1, 77, 128):
        for rows in (1, 600):
            for c in absorbed(rows, keys, half):
                assert ("absorbed_probabilities", None, None, c.rows, None, c.warps) in gate


def test_the_key_of_a_case_is_the_one_it_is_looked_up_by() -> None:
    """By hand: 3 samples of 2 heads, and 77 tokens of text each."""
    found = {case.operator: key_of(case).sizes for case in measuring.cases(3, torch.bfloat16, SMALL, BANK)}
    assert found["text_kv"] == {"rank": 16, "rows": 231, "columns": 32}
    assert found["short_key_attention"] == {"head_width": 8, "heads": 6, "tokens": 24}
    assert found["bank_lora"] == {"rank": 16, "rows": 8, "adapters": 2, "width": 16, "depth": 16}, "the bank's"
    assert found["absorbed_attention"] == {"keys": 80, "rows": 24, "heads": 6, "width": 16}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and it would be tuned")
def test_without_a_gpu_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "kernels", "--tune", "--table", str(tmp_path)]) == 2
    assert "--tune measures kernels and needs an NVIDIA GPU, which is not here" in capsys.readouterr().err
    assert main(["profile", "kernels", "--table", str(tmp_path)]) == 2
    assert "--table goes with --tune" in capsys.readouterr().err
    assert main(["profile", "kernels", "--tune", "--out", str(tmp_path)]) == 2
    assert "use --table in place of --out" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
