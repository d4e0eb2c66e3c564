"""Attention to few keys: every path against the reference, forward, map and gradients, by tensor name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lit_kernels.short_key_attention import short_key_attention
from lit_kernels.short_key_attention.function import unsupported


class Case(NamedTuple):
    batch: int
    queries: int
    keys: int
    heads: int
    width: int
    mask: str = ""  # "bool" masks all keys of the last sample of several, "added" one key of each
    layout: str = ""  # "sliced": K and V are columns of a wider tensor; "turned": T is the last axis in memory


# Every value of one column meets every value of another at least once, in odd shapes.
CASES = [
    Case(1, 33, 77, 2, 40, layout="sliced"),
    Case(3, 5, 128, 1, 40, "bool", "turned"),
    Case(1, 70, 128, 2, 64, "added"),
    Case(3, 33, 77, 1, 64, layout="sliced"),
    Case(3, 5, 77, 2, 80, "added", "turned"),
    Case(1, 65, 19, 1, 80, "bool", "sliced"),
    Case(3, 17, 77, 1, 160, "bool"),
    Case(1, 47, 100, 2, 160, "added", "sliced"),
    Case(1, 1, 7, 3, 8, layout="turned"),
]


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        # Values that every dtype holds exactly, so that all paths begin with the same numbers.
        return torch.randn(*shape, generator=g).to(torch.bfloat16).to(device, dtype)

    columns = case.heads * case.width
    if case.layout == "turned":
        q, k, v = (draw(case.batch, columns, n).transpose(1, 2) for n in (case.queries, case.keys, case.keys))
    elif case.layout == "sliced":
        q, (_, k, v, _) = (
            draw(case.batch, case.queries, columns),
            draw(case.batch, case.keys, 2 * columns + 24).split([16, columns, columns, 8], dim=2),
        )
    else:
        q, k, v = (draw(case.batch, n, columns) for n in (case.queries, case.keys, case.keys))
    found = {"q": q, "k": k, "v": v, "grad": draw(case.batch, case.queries, columns), "mask": None}
    if case.mask == "bool":
        found["mask"] = draw(case.batch, case.keys) > 0
        if case.batch > 1:
            found["mask"][-1] = False
    elif case.mask == "added":
        found["mask"] = draw(case.batch, case.keys)
        found["mask"][:, case.keys // 2] = float("-inf")
    return found


def run(case: Case, given: dict[str, Any], backend: Any) -> dict[str, Tensor]:
    """The output, the map, and the gradient d<name> of every input."""
    leaves = {name: given[name].detach().requires_grad_() for name in "qkv"}
    out, mean = short_key_attention(*leaves.values(), case.heads, given["mask"], want_map=True, backend=backend)
    assert out.is_contiguous() and not mean.requires_grad
    out.backward(given["grad"])
    gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"out": out.detach(), "map": mean, **gradients}


def as_double(given: dict[str, Any]) -> dict[str, Any]:
    real = {name: x.double() for name, x in given.items() if x is not None and x.dtype != torch.bool}
    return {**given, **real}


@pytest.mark.parametrize("backend", ["fallback", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_errs_no_more_than_plain_torch(
    case: Case, dtype: torch.dtype, backend: str, device: torch.device, agree: Callable[..., None]
) -> None:
    given = inputs(case, dtype, device)
    if backend == "triton" and unsupported(case.keys, case.width, dtype, device):
        backend = "auto"  # fp32 on a GPU
    agree(run(case, given, backend), run(case, given, "reference"), run(case, as_double(given), "reference"))


@pytest.mark.parametrize("backend", ["fallback", "triton"])
@pytest.mark.parametrize("case", [*CASES, Case(2, 9, 1, 1, 80)], ids=str)
def test_equals_the_reference_in_double(case: Case, backend: str) -> None:
    """On the CPU also where there is a GPU: its kernels have no fp64."""
    given = inputs(case, torch.float64, torch.device("cpu"))
    expected, found = run(case, given, "reference"), run(case, given, backend)
    assert found.keys() == expected.keys() and len(found) == 5
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_gradients_are_those_of_the_formula() -> None:
    case = Case(1, 1, 3, 1, 8, "added")
    given = inputs(case, torch.float64, torch.device("cpu"))
    leaves = [given[name].clone().requires_grad_() for name in "qkv"]
    assert torch.autograd.gradcheck(
        lambda q, k, v: short_key_attention(q, k, v, case.heads, given["mask"], backend="triton"), leaves, atol=1e-7
    )


@pytest.mark.parametrize("width", [40, 80, 160])
def test_a_program_may_walk_over_several_tiles(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranges of three tiles, the last one not full."""
    from lit_kernels.short_key_attention import backward

    monkeypatch.setattr(backward, "PROGRAMS", (3,))
    case = Case(1, 7 * backward.TILE + 5, 9, 1, width)
    assert backward.range_of(case.queries, case.batch * case.heads, 3) == 3 * backward.TILE
    given = inputs(case, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(run(case, given, "triton"), run(case, given, "reference"), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", "fallback", "triton"])
@pytest.mark.parametrize("mask", ["bool", "added"])
def test_a_sample_without_a_key_gets_zeros_and_gives_no_gradient(mask: str, backend: str, device: torch.device) -> None:
    case = Case(2, 5, 20, 2, 40, mask)
    given = inputs(case, torch.bfloat16, device)
    given["mask"][-1] = False if mask == "bool" else float("-inf")
    for name, value in run(case, given, backend).items():
        assert value[0].any() and not value[-1].any(), name


@pytest.mark.parametrize("backend", ["fallback", "triton"])
def test_a_masked_key_reaches_nothing(backend: str, device: torch.device) -> None:
    case = Case(1, 35, 77, 1, 64, "bool")
    given = inputs(case, torch.float16, device)
    expected = run(case, given, backend)
    hidden = ~given["mask"][0]
    assert 0 < int(hidden.sum()) < 77
    for name in "kv":
        given[name][:, hidden] = 3 * given[name][:, hidden] + 1
    found = run(case, given, backend)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    for name in ("dk", "dv"):
        assert not found[name][:, hidden].any() and found[name][:, ~hidden].any(), name
    assert not found["map"][..., hidden].any()


def test_keeps_only_what_it_was_given_and_copies_no_view(device: torch.device) -> None:
    case = Case(2, 37, 77, 2, 40, "added", "sliced")
    given = inputs(case, torch.bfloat16, device)
    assert given["k"].stride(1) > case.heads * case.width
    kept: list[Tensor] = []
    q, k, v = (given[name].requires_grad_() for name in "qkv")
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        short_key_attention(q, k, v, case.heads, given["mask"].float(), backend="triton")
    assert [x.data_ptr() for x in kept[:3]] == [x.data_ptr() for x in (q, k, v)]
    assert [x.stride() for x in kept[:3]] == [x.stride() for x in (q, k, v)]
    assert [x.shape for x in kept[3:]] == [given["mask"].shape]


def test_a_view_gives_the_bits_of_its_copy(device: torch.device) -> None:
    """Slices, K and V of one sample shared by all, and a gradient of one number."""
    case = Case(2, 37, 77, 2, 40, layout="sliced")
    given = inputs(case, torch.bfloat16, device)
    given |= {name: given[name][:1].expand(2, -1, -1) for name in "kv"}
    given["grad"] = given["grad"][:1, :1, :1].expand(2, 37, 80)
    found = run(case, given, "triton")
    copied = run(case, {n: None if x is None else x.contiguous() for n, x in given.items()}, "triton")
    for name, value in found.items():
        assert torch.equal(value, copied[name]), name


@pytest.mark.parametrize("case", [CASES[0], CASES[7]], ids=str)
def test_two_runs_have_the_same_bits(case: Case, device: torch.device) -> None:
    given = inputs(case, torch.float16, device)
    first, second = (run(case, given, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", [Case(2, 9, 154, 2, 40, "bool"), Case(2, 9, 5, 2, 12), Case(1, 9, 5, 1, 168)], ids=str)
def test_what_the_kernels_do_not_take_is_the_fallbacks(case: Case, device: torch.device) -> None:
    given = inputs(case, torch.float64, device)
    torch.testing.assert_close(run(case, given, "auto"), run(case, given, "reference"))
    with pytest.raises(ValueError, match="use backend='auto'"):
        run(case, given, "triton")


def test_all_widths_of_stable_diffusion_have_kernels() -> None:
    gpu = torch.device("cuda")
    for width in (40, 64, 80, 160):
        for keys in (1, 77, 128):
            assert not unsupported(keys, width, torch.bfloat16, gpu) and not unsupported(keys, width, torch.half, gpu)
    assert unsupported(129, 64, torch.bfloat16, gpu) == "129 keys are more than 128"
    assert unsupported(77, 64, torch.float32, gpu) == "torch.float32 on cuda is not supported"


def test_torch_knows_the_operators(device: torch.device) -> None:
    given = inputs(Case(2, 7, 5, 2, 8, "added", "sliced"), torch.float16, device)
    q, k, v = (given[name] for name in "qkv")
    torch.library.opcheck(torch.ops.lit_kernels.short_key_map, (q, k, None, 2))
    leaves = (x.requires_grad_() for x in (q, k, v))
    torch.library.opcheck(torch.ops.lit_kernels.short_key_attention, (*leaves, given["mask"].float(), 2))


def test_compiles_without_a_graph_break(device: torch.device) -> None:
    case = Case(2, 7, 5, 2, 8, "bool", "sliced")
    given = inputs(case, torch.float16, device)
    expected = run(case, given, "triton")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return short_key_attention(q, k, v, case.heads, given["mask"], want_map=True, backend="triton")

    leaves = {name: given[name].detach().requires_grad_() for name in "qkv"}
    out, mean = compiled(*leaves.values())
    out.backward(given["grad"])
    for name, value in {"out": out, "map": mean, **{f"d{n}": x.grad for n, x in leaves.items()}}.items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"v": torch.zeros(1, 5, 32)}, "Q, K and V are [1, 4, 16], [1, 5, 16], [1, 5, 32], not [B, T, C], [B, S, C]"),
        ({"q": torch.zeros(1, 4, 8)}, "Q, K and V are [1, 4, 8], [1, 5, 16], [1, 5, 16], not"),
        ({"q": torch.zeros(1, 4, 16).half()}, "torch.float16, torch.float32 and torch.float32; cast them to one dtype"),
        ({"heads": 3}, "16 columns are not divisible into 3 heads"),
        ({"mask": torch.zeros(1, 4)}, "the mask is [1, 4], the keys [1, 5]"),
        ({"mask": torch.zeros(1, 5).int()}, "the mask is torch.int32; use bool (True: takes part) or a floating"),
        ({"backend": "cuda"}, "unknown backend 'cuda'; use one of auto, triton, fallback, reference"),
        ({"heads": 4, "backend": "triton"}, "heads 4 wide are not a multiple of 8 up to 160; use backend='auto'"),
    ],
)
def test_says_what_does_not_fit(changes: dict[str, Any], said: str) -> None:
    given = {"q": torch.zeros(1, 4, 16), "k": torch.zeros(1, 5, 16), "v": torch.zeros(1, 5, 16)}
    given |= {"heads": 2, "mask": None, "backend": "auto"} | changes
    with pytest.raises(ValueError) as caught:
        short_key_attention(*(given[n] for n in ("q", "k", "v", "heads", "mask")), backend=given["backend"])
    assert said in str(caught.value)
