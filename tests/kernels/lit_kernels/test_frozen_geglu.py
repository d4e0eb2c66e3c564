"""The feed-forward gate: the kernels against the formula and against diffusers, and what they keep."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lit_kernels.frozen_geglu import frozen_geglu


class Case(NamedTuple):
    rows: tuple[int, ...]
    width: int
    layout: str


# Every value of one column meets every value of another at least once, in odd shapes.
CASES = [
    Case((1,), 1, "plain"),
    Case((1,), 300, "apart"),
    Case((1,), 513, "transposed"),
    Case((3, 7), 1, "transposed"),
    Case((3, 7), 300, "plain"),
    Case((3, 7), 513, "apart"),
    Case((), 1, "apart"),
    Case((), 300, "transposed"),
    Case((), 513, "plain"),
]


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """[h | g] and dy, of values that every dtype holds exactly; gates reach into both tails."""
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(torch.bfloat16).to(device, dtype)

    halves = torch.cat([draw(*case.rows, case.width), 2 * draw(*case.rows, case.width)], dim=-1)
    if case.layout == "apart":  # rows, or elements of a single row, are not neighbours
        wide = torch.cat([halves, draw(*halves.shape)], dim=-1)
        halves = wide[..., : 2 * case.width]
    elif case.layout == "transposed":
        halves = torch.stack([halves, draw(*halves.shape)], dim=-1)[..., 0]
    return halves, draw(*case.rows, case.width)


def run(given: tuple[Tensor, Tensor], backend: str) -> dict[str, Tensor]:
    """The result and the gradients of both halves."""
    projected = given[0].detach().requires_grad_()
    y = frozen_geglu(projected, backend)  # type: ignore[arg-type]
    y.backward(given[1])
    assert projected.grad is not None
    dh, dg = projected.grad.chunk(2, dim=-1)
    return {"y": y.detach(), "dh": dh, "dg": dg}


def by_triton(projected: Tensor) -> Tensor:
    return frozen_geglu(projected, "triton")


def as_double(given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return given[0].double(), given[1].double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_errs_no_more_than_plain_torch(
    case: Case, dtype: torch.dtype, device: torch.device, agree: Callable[..., None]
) -> None:
    given = inputs(case, dtype, device)
    agree(run(given, "triton"), run(given, "reference"), run(as_double(given), "reference"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference_in_double(case: Case, device: torch.device) -> None:
    given = inputs(case, torch.float64, device)
    found, expected = run(given, "triton"), run(given, "reference")
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-13, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


def test_the_formula_is_that_of_the_paper(device: torch.device) -> None:
    """h g Φ(g), with Φ of Python's own erfc, at five points."""
    gates = [-3.0, -0.5, 0.0, 1.0, 6.0]
    projected = torch.tensor([2.0] * 5 + gates, dtype=torch.float64, device=device)
    expected = [2 * g * 0.5 * math.erfc(-g / math.sqrt(2)) for g in gates]
    for backend in ("reference", "triton"):
        assert frozen_geglu(projected, backend).tolist() == pytest.approx(expected, rel=1e-12)  # type: ignore[arg-type]


def test_gradients_are_those_of_the_formula(device: torch.device) -> None:
    projected, _ = inputs(Case((2,), 3, "plain"), torch.float64, device)
    assert torch.autograd.gradcheck(by_triton, projected.requires_grad_(), atol=1e-7)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_equals_diffusers(backend: str, device: torch.device) -> None:
    from diffusers.models.activations import GEGLU

    torch.manual_seed(0)
    layer = GEGLU(6, 10).to(device)
    x, grad = torch.randn(2, 5, 6, device=device), torch.randn(2, 5, 10, device=device)
    found = {}
    for name in ("theirs", "ours"):
        leaf = x.clone().requires_grad_()
        y = layer(leaf) if name == "theirs" else frozen_geglu(layer.proj(leaf), backend)  # type: ignore[arg-type]
        y.backward(grad)
        found[name] = (y, leaf.grad)
    torch.testing.assert_close(found["ours"], found["theirs"], rtol=1e-5, atol=1e-6)


def test_keeps_its_input_alone_and_leaves_it_as_it_is(device: torch.device) -> None:
    """A kept graph may be gone through twice, and the input may have other uses."""
    projected, grad = inputs(Case((3, 7), 300, "plain"), torch.float32, device)
    before = projected.clone()
    projected.requires_grad_()
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = by_triton(projected)
    assert set(kept) == {projected.data_ptr()}
    first, second = (torch.autograd.grad(y, projected, grad, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.data_ptr() != projected.data_ptr()
    assert torch.equal(projected, before)
    assert torch.equal(by_triton(projected), y)


def test_what_is_not_finite_stays_in_its_element(device: torch.device) -> None:
    given = inputs(Case((5,), 300, "plain"), torch.float32, device)
    expected = run(given, "triton")
    given[0][2, 7] = float("nan")
    given[0][4, 300 + 9] = float("inf")
    found, plain = run(given, "triton"), run(given, "reference")
    for name, value in found.items():
        finite = value.isfinite()
        assert 1 <= (~finite).sum() <= 2 and torch.equal(finite, plain[name].isfinite()), name
        assert torch.equal(value[finite], expected[name][finite]), name


def operands(device: torch.device, learns: bool) -> tuple[Tensor]:
    return (inputs(Case((5,), 9, "plain"), torch.float32, device)[0].requires_grad_(learns),)


@pytest.mark.parametrize("learns", [False, True])
def test_torch_knows_the_operator(learns: bool, device: torch.device) -> None:
    torch.library.opcheck(torch.ops.lit_kernels.frozen_geglu, operands(device, learns))


def test_compiles_without_a_graph_break(device: torch.device) -> None:
    given = inputs(Case((2, 5), 9, "plain"), torch.float32, device)
    expected = run(given, "triton")
    leaf = given[0].clone().requires_grad_()
    y = torch.compile(by_triton, fullgraph=True, backend="aot_eager")(leaf)
    y.backward(given[1])
    assert torch.equal(y, expected["y"]) and leaf.grad is not None
    assert torch.equal(leaf.grad, torch.cat([expected["dh"], expected["dg"]], dim=-1))


def test_nothing_gives_nothing(device: torch.device) -> None:
    assert frozen_geglu(torch.zeros(0, 8, device=device)).shape == (0, 4)
    with pytest.raises(ValueError, match="there are no elements; use backend='auto'"):
        frozen_geglu(torch.zeros(0, 8, device=device), "triton")


@pytest.mark.parametrize(
    ("projected", "backend", "said"),
    [
        (torch.zeros(2, 7), "auto", "the last axis of [2, 7] does not hold two halves"),
        (torch.zeros(()), "auto", "the last axis of [] does not hold two halves"),
        (torch.zeros(2, 8, dtype=torch.int64), "auto", "torch.int64 has no gradient; use fp64, fp32, fp16 or bf16"),
        (torch.zeros(2, 8), "cuda", "unknown backend 'cuda'; use one of auto, triton, fallback, reference"),
    ],
)
def test_says_what_does_not_fit(projected: Tensor, backend: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        frozen_geglu(projected, backend)  # type: ignore[arg-type]
    assert said in str(caught.value)
