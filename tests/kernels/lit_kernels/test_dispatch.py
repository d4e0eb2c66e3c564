"""Tables of GPUs: what was faster is taken, sizes in between go to the nearest, and what is unknown is no error."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lit_kernels
from lit_kernels import dispatch, measuring, table_files
from lit_kernels.absorbed_attention.layers import KeptText
from lit_kernels.frozen_geglu import frozen_geglu
from lit_kernels.table_files import Entry, Key
from lit_kernels.tuning import key_of

GPU = "NVIDIA Test GPU 80GB"
SMALL = {"small": {"text": 16, "layers": [(16, 2, 24, 1), (32, 2, 6, 1)]}}
BANK = {"adapters": 2, "width": 16, "tokens": 4, "parameters": 40}
META = torch.device("meta")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(dispatch.__file__).parents[1])}
Put = Callable[..., Path]


def cases(dtype: torch.dtype = torch.float16) -> list[measuring.Case]:
    """One of each operator."""
    return list({case.operator: case for case in measuring.cases(2, dtype, SMALL, BANK)}.values())


def entry(key: Key, path: str = "triton", tiles: dict[str, str] | None = None) -> Entry:
    name = str(key.dtype).removeprefix("torch.")
    return Entry(key.operator, name, dict(key.sizes), path, 2.0, 1.0, tiles or {})


def key(rank: int = 16, **sizes: int) -> Key:
    return Key("text_kv", torch.bfloat16, {"rank": rank, **sizes})


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Put]:
    """`put(*entries)` makes a table of them for the GPU that every device now is."""
    monkeypatch.setenv(table_files.VARIABLE, str(tmp_path))
    monkeypatch.setattr(dispatch, "gpu_of", functools.cache(lambda device: GPU))
    dispatch.forget()

    def write(*entries: Entry) -> Path:
        file = table_files.file_of(GPU, tmp_path)
        table_files.write(file, GPU, entries)
        dispatch.forget()
        return file

    yield write
    monkeypatch.undo()
    dispatch.forget()


class Ours(TorchDispatchMode):
    """Whether an operator of ours runs inside."""

    ran = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran |= func.namespace == "lit_kernels"
        return func(*args, **(kwargs or {}))


def path_of(run: Callable[[Any], Any], backend: str) -> str:
    with Ours() as seen:
        run(backend)
    return "triton" if seen.ran else "fallback"


LOOKS_ITSELF_UP = [case for case in cases() if case.operator != "absorbed_attention"]


@pytest.mark.parametrize("case", LOOKS_ITSELF_UP, ids=lambda case: case.operator)
def test_auto_takes_what_was_faster(case: measuring.Case, put: Put) -> None:
    built = case.build(META)
    assert path_of(built.run, "auto") == "triton", "nothing is known of it"
    put(entry(key_of(case), "fallback"))
    assert path_of(built.run, "auto") == "fallback"
    assert path_of(built.run, "triton") == "triton", "asked for by name"
    put(entry(key_of(case), "triton"))
    assert path_of(built.run, "auto") == "triton"


def test_a_layer_is_absorbed_unless_it_was_faster_as_it_is(put: Put) -> None:
    """`absorbed_attention` replaces a layer, so that the layer asks."""
    from diffusers.models.attention_processor import Attention

    attention = Attention(1280, cross_attention_dim=768, heads=8, dim_head=160).to(META, torch.float16).eval()
    attention.requires_grad_(False)
    shapes = ((77, 768), (77, 1280), (1024, 1280))
    text, states, x = (torch.empty(1, *shape, device=META, dtype=torch.float16) for shape in shapes)

    def absorbed() -> bool:
        kept = KeptText(text, 1.0, {"attn2": (states, states)}, 30, "auto", seen=2)
        return kept.attend("attn2", attention, x) is not None

    known = Key("absorbed_attention", torch.float16, {"keys": 80, "rows": 1024, "heads": 8, "width": 1280})
    assert absorbed(), "nothing is known of it"
    put(entry(known, "fallback"))
    assert not absorbed()
    put(entry(known, "triton"))
    assert absorbed()


def test_a_size_in_between_goes_to_the_nearest_by_ratio(put: Put) -> None:
    put(entry(key(rows=100), "fallback"), entry(key(rows=10_000)), entry(key(rank=64, rows=900)))
    found = [dispatch.path(key(rows=rows), META) for rows in (1, 990, 1010, 10**6)]
    assert found == ["fallback", "fallback", "triton", "triton"], "the limit is 1000, the geometric mean"
    assert dispatch.path(key(rank=64, rows=100), META) == "triton", "an entry of another rank says nothing"
    assert dispatch.path(key(rank=32, rows=100), META) == "triton"
    other = Key("text_kv", torch.float16, {"rank": 16, "rows": 100})
    assert dispatch.path(other, META) == "triton", "nor does one of another dtype"


def test_all_sizes_count(put: Put) -> None:
    corners = [(rows, columns) for rows in (10, 1000) for columns in (10, 1000)]
    paths = {(r, c): "fallback" if r > c else "triton" for r, c in corners}
    put(*(entry(key(rows=r, columns=c), path, {"forward": f"{r} {c}"}) for (r, c), path in paths.items()))
    assert dispatch.path(key(rows=200, columns=60), META) == "fallback"
    assert dispatch.path(key(rows=200, columns=200), META) == "triton"
    offered = [f"{r} {c}" for r, c in corners]
    assert dispatch.tile(key(rows=200, columns=60), "forward", META, offered) == "1000 10"
    assert dispatch.tile(key(rows=60, columns=200), "forward", META, offered) == "10 1000"
    assert dispatch.tile(key(columns=200), "forward", META, ["default", *offered]) in ("10 1000", "1000 1000")


def test_what_is_unknown_takes_the_default(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = key(rows=5)
    put(entry(asked, tiles={"forward": "no longer offered"}))
    assert dispatch.tile(asked, "forward", META, ["a", "b"]) == "a"
    assert dispatch.tile(asked, "backward", META, ["a", "b"]) == "a"
    put(entry(asked, "fallback", {"forward": "b"}))
    assert (dispatch.tile(asked, "forward", META, ["a", "b"]), dispatch.path(asked, META)) == ("b", "fallback")
    for name in ("", "Another GPU"):
        monkeypatch.setattr(dispatch, "gpu_of", functools.cache(lambda device, name=name: name))
        dispatch.forget()
        assert (dispatch.tile(asked, "forward", META, ["a", "b"]), dispatch.path(asked, META)) == ("a", "triton")


def test_the_folder_that_is_named_comes_before_the_packages(put: Put, tmp_path: Path, monkeypatch: Any) -> None:
    own = tmp_path / "own"
    table_files.write(table_files.file_of(GPU, own), GPU, [entry(key(rows=5), "fallback")])
    monkeypatch.setattr(dispatch, "FOLDER", own)
    dispatch.forget()
    assert dispatch.path(key(rows=5), META) == "fallback", "the package's, since the named one has none of this GPU"
    put(entry(key(rows=5), "triton"))
    assert dispatch.path(key(rows=5), META) == "triton"
    monkeypatch.setenv(table_files.VARIABLE, str(tmp_path / "gone"))
    dispatch.forget()
    with pytest.raises(ValueError, match=r"LIT_KERNELS_TABLES=.*gone: there is no such folder; unset it, or make"):
        dispatch.path(key(rows=5), META)


GOOD = json.loads(json.dumps(entry(key(rows=5)).__dict__))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Expecting value"),
        ("[]", "TypeError"),
        ('{"format": 9, "entries": []}', "its format is 9, not 1"),
        ('{"format": 1}', "KeyError: 'entries'"),
        (json.dumps({"format": 1, "entries": [{**GOOD, "path": "cublas"}]}), "'cublas', not one of triton, fallback"),
        (json.dumps({"format": 1, "entries": [{**GOOD, "sizes": {"rows": 0}}]}), "not whole numbers above 0"),
        (json.dumps({"format": 1, "entries": [{**GOOD, "dtype": "bf17"}]}), "bf17"),
        (json.dumps({"format": 1, "entries": [{**GOOD, "speed": 3}]}), "unexpected keyword argument 'speed'"),
    ],
)
def test_a_wrong_table_is_one_error_that_names_it_and_the_fix(text: str, said: str, put: Put) -> None:
    file = put()
    file.write_text(text)
    with pytest.raises(ValueError) as found:
        dispatch.path(key(rows=5), META)
    told = str(found.value)
    assert told.startswith(f"{file} is no table of kernels") and said in told
    assert f"rm {file}; litp profile kernels --tune --table {file.parent}" in told


def test_a_wrong_table_is_told_before_anything_is_patched(put: Put) -> None:
    from diffusers import UNet2DConditionModel

    put().write_text("{}")
    unet = UNet2DConditionModel(
        block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=8, attention_head_dim=2, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    before = {name: processor for name, processor in unet.attn_processors.items()}
    with pytest.raises(ValueError, match="is no table of kernels"):
        lit_kernels.patch(unet)
    assert unet.attn_processors == before


def test_a_table_is_written_whole_or_not_at_all(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    file = put(entry(key(rows=5), "fallback"))
    before = file.read_text()
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
            patch.setattr(table_files.os, name, _full)
            table_files.write(file, GPU, [entry(key(rows=6))])
        assert file.read_text() == before and list(file.parent.iterdir()) == [file]
    assert table_files.read(file) == [entry(key(rows=5), "fallback")]


def _full(*arguments: Any) -> None:
    raise OSError("the disk is full")


def test_compiled_code_asks_for_the_side_of_a_limit_and_not_for_every_size(put: Put) -> None:
    sizes = [Key("frozen_geglu", torch.float16, {"rows": rows, "width": 8}) for rows in (10, 1000, 100_000)]
    put(*(entry(size, path) for size, path in zip(sizes, ("fallback", "triton", "fallback"), strict=True)))
    graphs: list[str] = []

    def backend(module: Any, inputs: Any) -> Any:
        graphs.append("triton" if "lit_kernels" in module.code else "fallback")
        return module.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda x: frozen_geglu(x), fullgraph=True, backend=backend)
    for rows in (30, 50, 200, 300, 400, 9_000, 20_000, 30_000, 40_000, 31, 7, 60):
        assert compiled(torch.empty(rows, 16, dtype=torch.float16, device="meta")).shape == (rows, 8)
    assert sorted(set(graphs)) == ["fallback", "triton"] and len(graphs) <= 5, graphs


def test_importing_the_package_imports_neither_the_compiler_nor_triton() -> None:
    code = "import sys, lit_kernels.measuring; print({'triton', 'torch._dynamo'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, timeout=200)
    assert done.stdout == "set()\n", done.stderr


def test_a_name_is_a_file_name_and_tables_are_in_the_wheel() -> None:
    assert table_files.file_of("NVIDIA A100-SXM4/80GB", Path("t")) == Path("t/NVIDIA-A100-SXM4-80GB.json")
    told = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    assert f"{table_files.FOLDER.name}/*.json" in told["tool"]["setuptools"]["package-data"]["lit_kernels"]
    for file in table_files.FOLDER.glob("*.json"):
        assert table_files.read(file), "the tables that the package brings along can be read"
