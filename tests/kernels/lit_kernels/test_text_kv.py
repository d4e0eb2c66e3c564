"""K and V of all layers in one launch: every path against the reference, forward and gradients, by tensor name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lit_kernels.text_kv import text_key_values


class Case(NamedTuple):
    batch: int
    tokens: int
    depth: int
    widths: tuple[int, ...]
    rank: int
    detach: bool = False
    transposed: bool = False


# Every value of one column meets every value of another at least once, in odd shapes.
CASES = [
    Case(1, 1, 24, (8,), 1),
    Case(3, 77, 40, (80, 24, 24), 4, detach=True),
    Case(1, 77, 96, (320, 64, 100), 7, transposed=True),
    Case(3, 1, 33, (40, 40), 16, detach=True, transposed=True),
    Case(1, 154, 70, (160, 16), 64, detach=True),
    Case(3, 77, 64, (64, 128), 16),
]


def inputs(case: Case, dtype: torch.dtype, device: torch.device, factors: torch.dtype | None = None) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int, to: torch.dtype = dtype) -> Tensor:
        # Values that every dtype holds exactly, so that all paths begin with the same numbers.
        return torch.randn(*shape, generator=g).to(torch.bfloat16).to(device, to)

    size = (case.depth, case.tokens) if case.transposed else (case.tokens, case.depth)
    text = draw(case.batch, *size)
    found: dict[str, Any] = {"text": text.transpose(1, 2) if case.transposed else text}
    for i, width in enumerate(case.widths):
        found |= {f"w{i}": draw(width, case.depth), f"grad{i}": draw(case.batch, case.tokens, width)}
        found[f"a{i}"] = draw(case.rank, case.depth, to=factors or dtype)
        found[f"b{i}"] = draw(width, case.rank, to=factors or dtype)
    found["scales"] = draw(len(case.widths)).abs() + 0.5
    return found


def run(case: Case, given: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """Results y0, y1, ... and the gradient d<name> of every input."""
    slices = range(len(case.widths))
    leaves = {name: value.detach().requires_grad_() for name, value in given.items() if name[0] in "twab"}
    weights, downs, ups = ([leaves[f"{kind}{i}"] for i in slices] for kind in "wab")
    ys = text_key_values(leaves["text"], weights, downs, ups, given["scales"], case.detach, backend)  # type: ignore[arg-type]
    torch.autograd.backward(ys, [given[f"grad{i}"] for i in slices])
    found = {f"y{i}": y.detach() for i, y in enumerate(ys)}
    return found | {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def as_double(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() for name, value in given.items()}


@pytest.mark.parametrize("backend", ["fallback", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_errs_no_more_than_plain_torch(
    case: Case, dtype: torch.dtype, backend: str, device: torch.device, agree: Callable[..., None]
) -> None:
    given = inputs(case, dtype, device)
    agree(run(case, given, backend), run(case, given, "reference"), run(case, as_double(given), "reference"))


@pytest.mark.parametrize("backend", ["fallback", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference_in_double(case: Case, backend: str, device: torch.device) -> None:
    given = inputs(case, torch.float64, device)
    expected = run(case, given, "reference")
    found = run(case, given, backend)
    assert found.keys() == expected.keys() and len(found) == 1 + 4 * len(case.widths)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("detach", [False, True])
def test_gradients_are_those_of_the_formula(detach: bool, device: torch.device) -> None:
    case = Case(1, 3, 4, (3, 5), 2)
    given = inputs(case, torch.float64, device)
    names = [name for name in given if name[0] in "twab"]

    def values(*tensors: Tensor) -> tuple[Tensor, ...]:
        by = dict(zip(names, tensors, strict=True))
        parts = ([by[f"{kind}{i}"] for i in range(2)] for kind in "wab")
        ys = text_key_values(by["text"], *parts, given["scales"], detach, "triton")
        return tuple(y[:, 1:] for y in ys) if detach else tuple(ys)  # token 0's values move; nothing learns from them

    leaves = [given[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(values, leaves, atol=1e-7)


def test_factors_in_fp32_get_fp32_gradients(device: torch.device, agree: Callable[..., None]) -> None:
    """bf16 text and weights, fp32 factors: gradients are not rounded to bf16 on their way."""
    case = Case(2, 77, 64, (64, 40), 4)
    given = inputs(case, torch.bfloat16, device, factors=torch.float32)
    found = run(case, given, "triton")
    assert {found[n].dtype for n in ("da0", "da1", "db0", "db1")} == {torch.float32}
    assert (found["da0"] != found["da0"].bfloat16()).any()
    plain = run(case, {n: v.to(torch.bfloat16) for n, v in given.items()}, "reference")
    exact = run(case, as_double(given), "reference")
    agree(found, {n: v.to(found[n].dtype) for n, v in plain.items()}, exact)


def test_an_untrained_adapter_changes_nothing(device: torch.device) -> None:
    """B = 0: the projections' own bits, and no gradient for A."""
    case = Case(2, 77, 64, (64, 40), 4)
    given = inputs(case, torch.float32, device)
    given |= {name: torch.zeros_like(value) for name, value in given.items() if name[0] == "b"}
    found = run(case, given, "triton")
    without = run(case, {**given, **{f"a{i}": 3 * given[f"a{i}"] for i in range(2)}}, "triton")
    for i in range(2):
        assert torch.equal(found[f"y{i}"], without[f"y{i}"])
        assert not found[f"da{i}"].any() and found[f"db{i}"].any()


def test_a_first_token_that_is_not_finite_reaches_no_factor(device: torch.device) -> None:
    case = Case(2, 7, 16, (8, 24), 2, detach=True)
    given = inputs(case, torch.float32, device)
    expected = run(case, given, "triton")
    for i in range(2):
        given[f"grad{i}"][:, 0] = float("nan")
    found = run(case, given, "triton")
    for name in ("da0", "db0", "da1", "db1"):
        assert torch.equal(found[name], expected[name]), name


def test_two_runs_have_the_same_bits(device: torch.device) -> None:
    given = inputs(CASES[1], torch.float16, device)
    first, second = (run(CASES[1], given, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_projections_alone(device: torch.device) -> None:
    """Without factors (Custom Diffusion trains W): one product, with gradients of every W."""
    case = Case(2, 9, 32, (16, 24, 16), 1, detach=True)
    given = inputs(case, torch.float64, device)
    found = {}
    for backend in ("reference", "auto"):
        weights = [given[f"w{i}"].clone().requires_grad_() for i in range(3)]
        ys = text_key_values(given["text"], weights, detach_first_token=True, backend=backend)  # type: ignore[arg-type]
        torch.autograd.backward(ys, [given[f"grad{i}"] for i in range(3)])
        found[backend] = [*(y.detach() for y in ys), *(w.grad for w in weights)]
    torch.testing.assert_close(found["auto"], found["reference"])


@pytest.mark.parametrize(
    ("factors", "backend"), [(False, "reference"), (False, "fallback"), (True, "fallback"), (True, "triton")]
)
def test_masters_in_fp32_beside_half_precision(device: torch.device, factors: bool, backend: Any) -> None:
    """W is rounded to the text's dtype, and learns in its own."""
    case = Case(2, 9, 32, (16, 24), 4)
    given = inputs(case, torch.float16, device, factors=torch.float32)
    downs, ups = ([given[f"{n}{i}"] for i in range(2)] if factors else [] for n in "ab")
    results = []
    for dtype in (torch.float32, torch.float16):
        weights = [given[f"w{i}"].to(dtype).requires_grad_() for i in range(2)]
        ys = text_key_values(given["text"], weights, downs, ups, given["scales"] if factors else None, False, backend)
        torch.autograd.backward(ys, [given[f"grad{i}"] for i in range(2)])
        results.append([*ys, *(w.grad for w in weights)])
    assert [x.dtype for x in results[0]] == [torch.float16] * 2 + [torch.float32] * 2
    for master, rounded in zip(*results, strict=True):
        assert torch.equal(master.half(), rounded)


def operands(device: torch.device, learns: bool) -> tuple[Any, ...]:
    case = Case(2, 7, 16, (8, 24), 2)
    given = inputs(case, torch.float32, device)
    text = given["text"].flatten(0, 1)
    down = torch.stack([given["a0"], given["a1"]])
    parts = (text, torch.cat([given["w0"], given["w1"]]), down, torch.cat([given["b0"], given["b1"]]))
    return (*(part.requires_grad_(learns) for part in parts), given["scales"], [8, 24], 7)


@pytest.mark.parametrize("learns", [False, True])
def test_torch_knows_the_operator(learns: bool, device: torch.device) -> None:
    torch.library.opcheck(torch.ops.lit_kernels.text_key_values, operands(device, learns))


def test_compiles_without_a_graph_break(device: torch.device) -> None:
    case = Case(2, 7, 16, (8, 24), 2, detach=True)
    given = inputs(case, torch.float32, device)
    expected = run(case, given, "triton")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(text: Tensor, weights: list[Tensor], downs: list[Tensor], ups: list[Tensor]) -> list[Tensor]:
        return text_key_values(text, weights, downs, ups, given["scales"], True, "triton")

    leaves = {name: value.detach().requires_grad_() for name, value in given.items() if name[0] in "ab"}
    ys = compiled(given["text"], *([({**given, **leaves})[f"{k}{i}"] for i in range(2)] for k in "wab"))
    torch.autograd.backward(ys, [given["grad0"], given["grad1"]])
    for i in range(2):
        torch.testing.assert_close(ys[i], expected[f"y{i}"])
        torch.testing.assert_close(leaves[f"a{i}"].grad, expected[f"da{i}"])
        torch.testing.assert_close(leaves[f"b{i}"].grad, expected[f"db{i}"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"downs": 1}, "2 weights need as many A, B and scales"),
        ({"rank": 65, "backend": "triton"}, "rank 65 is above 64; use backend='auto'"),
        ({"depth": 15}, "weight 0 is [8, 16], the text 15 wide"),
        ({"backend": "cuda"}, "unknown backend 'cuda'; use one of auto, triton, fallback, reference"),
        ({"up": 3}, "slice 1 has A [2, 16] and B [24, 3], not [2, 16] and [24, 2]"),
    ],
)
def test_says_what_does_not_fit(changes: dict[str, Any], said: str) -> None:
    rank, depth = changes.get("rank", 2), changes.get("depth", 16)
    weights = [torch.zeros(8, 16), torch.zeros(24, 16)]
    downs = [torch.zeros(rank, 16)] * changes.get("downs", 2)
    ups = [torch.zeros(8, rank), torch.zeros(24, changes.get("up", rank))]
    with pytest.raises(ValueError) as caught:
        backend = changes.get("backend", "auto")
        text_key_values(torch.zeros(1, 4, depth), weights, downs, ups, torch.ones(2), backend=backend)
    assert said in str(caught.value)


def test_ranks_without_a_kernel_take_the_fallback(device: torch.device) -> None:
    case = Case(1, 5, 80, (16, 16), 70)
    given = inputs(case, torch.float64, device)
    found, expected = run(case, given, "auto"), run(case, given, "reference")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
