"""A bank of LoRAs on one layer: every path against the reference, and no adapter sees another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lit_kernels import dispatch
from lit_kernels.bank_lora import bank_lora, fallback, forward
from lit_kernels.bank_lora.function import launched


class Case(NamedTuple):
    adapters: int
    batch: int
    tokens: int
    depth: int
    width: int
    rank: int
    bias: bool = False
    transposed: bool = False


# Every value of one column meets every value of another at least once, in odd shapes.
CASES = [
    Case(1, 1, 1, 24, 8, 1, bias=True),
    Case(1, 3, 200, 40, 36, 4, transposed=True),  # 600 rows: more than one part of dA and dB
    Case(3, 3, 64, 33, 140, 7, bias=True),
    Case(3, 3, 131, 70, 24, 64, transposed=True),  # two tiles an adapter, the second of 3 rows
    Case(2, 6, 5, 130, 129, 16, bias=True, transposed=True),
    Case(2, 2, 77, 48, 80, 20),
]
PATHS = ["triton", "grouped", "augmented"]


def inputs(case: Case, dtype: torch.dtype, device: torch.device, factors: torch.dtype | None = None) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int, to: torch.dtype = dtype) -> Tensor:
        # Values that every dtype holds exactly, so that all paths begin with the same numbers.
        return torch.randn(*shape, generator=g).to(torch.bfloat16).to(device, to)

    adapters, batch, tokens, depth, width, rank, bias, transposed = case
    x = draw(batch, *((depth, tokens) if transposed else (tokens, depth)))
    found = {
        "x": x.mT if transposed else x,
        "a": draw(adapters, rank, depth, to=factors or dtype),
        "b": draw(adapters, width, rank, to=factors or dtype),
        "w": draw(width, depth),
        "scales": draw(adapters).abs() + 0.5,
        "grad": draw(batch, tokens, width),
    }
    return found | ({"bias": draw(width)} if bias else {})


def applied(path: str, x: Tensor, w: Tensor, a: Tensor, b: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    if path in ("grouped", "augmented"):
        y = fallback.bank_lora(x.reshape(-1, x.shape[-1]), w, a, b, scales, bias, path == "augmented")
        return y.unflatten(0, x.shape[:-1])
    return bank_lora(x, w, a, b, scales, bias, path)  # type: ignore[arg-type]


def run(given: dict[str, Any], path: str) -> dict[str, Tensor]:
    """The result y and the gradients dx, da and db."""
    x, a, b = (given[name].detach().requires_grad_() for name in "xab")
    y = applied(path, x, given["w"], a, b, given["scales"], given.get("bias"))
    y.backward(given["grad"])
    return {"y": y.detach(), "dx": x.grad, "da": a.grad, "db": b.grad}


def as_double(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() for name, value in given.items()}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_errs_no_more_than_plain_torch(
    case: Case, dtype: torch.dtype, path: str, device: torch.device, agree: Callable[..., None]
) -> None:
    given = inputs(case, dtype, device)
    agree(run(given, path), run(given, "reference"), run(as_double(given), "reference"))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference_in_double(case: Case, path: str, device: torch.device) -> None:
    given = inputs(case, torch.float64, device)
    found, expected = run(given, path), run(given, "reference")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("path", ["triton", "augmented"])
def test_gradients_are_those_of_the_formula(path: str, device: torch.device) -> None:
    given = inputs(Case(2, 2, 1, 2, 3, 1, bias=True), torch.float64, device)
    leaves = [given[name].clone().requires_grad_() for name in "xab"]

    def value(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return applied(path, x, given["w"], a, b, given["scales"], given["bias"])

    assert torch.autograd.gradcheck(value, leaves, atol=1e-7)


@pytest.mark.parametrize("needed", ["x", "a", "b", "ab"])
def test_gives_the_gradients_that_are_asked_for(needed: str, device: torch.device) -> None:
    given = inputs(Case(2, 2, 9, 20, 24, 3), torch.float64, device)
    for path in PATHS:
        leaves = {name: given[name].clone().requires_grad_(name in needed) for name in "xab"}
        applied(path, leaves["x"], given["w"], leaves["a"], leaves["b"], given["scales"], None).backward(given["grad"])
        expected = run(given, "reference")
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == (name in needed), f"{path}: {name}"
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, expected[f"d{name}"])


@pytest.mark.parametrize("rank", [4, 20])
@pytest.mark.parametrize("path", PATHS)
def test_factors_in_fp32_get_fp32_gradients(
    path: str, rank: int, device: torch.device, agree: Callable[..., None]
) -> None:
    """bf16 rows and weights, fp32 factors: the kernels' gradients are not rounded to bf16 on their way."""
    case = Case(2, 2, 77, 64, 40, rank)
    given = inputs(case, torch.bfloat16, device, factors=torch.float32)
    found = run(given, path)
    assert found["da"].dtype == found["db"].dtype == torch.float32
    if path == "triton":
        assert all((found[name] != found[name].bfloat16()).any() for name in ("da", "db"))
    plain = run({n: v.to(torch.bfloat16) for n, v in given.items()}, "reference")
    agree(found, {n: v.to(found[n].dtype) for n, v in plain.items()}, run(as_double(given), "reference"))


SPOILS: dict[str, Callable[[dict[str, Any]], None]] = {
    "A": lambda given: given["a"][1, 0].fill_(float("nan")),
    "B": lambda given: given["b"][1, 2].fill_(float("inf")),
    "scale": lambda given: given["scales"][1].fill_(float("nan")),
    "rows": lambda given: given["x"][3, 4].fill_(float("nan")),  # sample 3 of 6 is the second of adapter 1
    "gradient": lambda given: given["grad"][2, :, 1].fill_(float("-inf")),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("spoiled", SPOILS)
@pytest.mark.parametrize("rank", [2, 20])
def test_what_is_not_finite_stays_with_its_adapter(rank: int, spoiled: str, path: str, device: torch.device) -> None:
    """Every result and gradient of the others keeps its bits; the adapter's own do not pretend to be finite."""
    given = inputs(Case(3, 6, 35, 24, 40, rank, bias=True), torch.float32, device)
    clean = run(given, path)
    SPOILS[spoiled](given)
    found = run(given, path)
    shares = {name: value.unflatten(0, (3, -1)) for name, value in found.items()}
    for name, value in clean.items():
        for g in (0, 2):
            assert torch.equal(shares[name][g], value.unflatten(0, (3, -1))[g]), f"{name} of adapter {g}"
    expected = run(given, "reference")
    for name, share in shares.items():  # what is not finite in the formula is not finite here
        wrong = ~expected[name].unflatten(0, (3, -1))[1].isfinite()
        assert not share[1][wrong].isfinite().any(), name


@pytest.mark.parametrize("tokens", [64, 260])
def test_an_adapter_has_the_same_bits_in_a_bank_and_alone(tokens: int, device: torch.device) -> None:
    given = inputs(Case(2, 4, tokens, 20, 36, 4, bias=True), torch.float16, device)
    bank = run(given, "triton")
    for g in range(2):
        own = {name: given[name][g : g + 1] for name in ("a", "b", "scales")} | {n: given[n] for n in ("w", "bias")}
        own |= {name: given[name].unflatten(0, (2, -1))[g] for name in ("x", "grad")}
        for name, value in run(own, "triton").items():
            assert torch.equal(value.flatten(), bank[name].unflatten(0, (2, -1))[g].flatten()), f"{name} of {g}"


@pytest.mark.parametrize("path", PATHS)
def test_an_untrained_adapter_changes_nothing(path: str, device: torch.device) -> None:
    """B = 0: A does not matter for the result and gets no gradient."""
    given = inputs(Case(2, 2, 9, 24, 40, 4), torch.float32, device)
    given["b"].zero_()
    found, other = run(given, path), run({**given, "a": 3 * given["a"]}, path)
    assert torch.equal(found["y"], other["y"])
    assert not found["da"].any() and found["db"].any()


@pytest.mark.parametrize("path", PATHS)
def test_two_runs_have_the_same_bits(path: str, device: torch.device) -> None:
    given = inputs(CASES[1], torch.float16, device)
    first, second = (run(given, path) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def joint_inputs(parts: int, case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """As `inputs`, with another W, A, B, scale and gradient for each part of one x."""
    given = inputs(case, dtype, device)
    g = torch.Generator().manual_seed(2)
    for name in ("w", "a", "b", "scales", "grad"):
        first = given[name]
        others = [torch.randn(first.shape, generator=g).bfloat16().to(device, dtype) for _ in range(parts - 1)]
        given[name] = [first, *others]
    return given


def run_joint(given: dict[str, Any], path: str, unused: int | None = None) -> dict[str, Tensor]:
    """As `run`, of all parts; the result of part `unused` is not used."""
    x, parts = given["x"].detach().requires_grad_(), range(len(given["w"]))
    downs, ups = ([factor.detach().requires_grad_() for factor in given[name]] for name in "ab")
    if path == "joint":
        ys = launched(x, given["w"], downs, ups, torch.stack(given["scales"]))
    else:
        ys = [bank_lora(x, given["w"][p], downs[p], ups[p], given["scales"][p], None, path) for p in parts]  # type: ignore[arg-type]
    used = [p for p in parts if p != unused]
    torch.autograd.backward([ys[p] for p in used], [given["grad"][p] for p in used])
    found = {"dx": x.grad} | {f"y{p}": ys[p].detach() for p in used}
    return found | {f"d{n}{p}": factors[p].grad for n, factors in (("a", downs), ("b", ups)) for p in used}


JOINT = [(2, Case(1, 3, 200, 40, 36, 4)), (3, Case(2, 2, 77, 33, 140, 7)), (3, Case(1, 2, 5, 24, 20, 20))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("parts", "case"), JOINT, ids=str)
def test_layers_of_one_input_are_parts_of_one_launch(
    parts: int, case: Case, dtype: torch.dtype, device: torch.device, agree: Callable[..., None]
) -> None:
    given = joint_inputs(parts, case, dtype, device)
    double = {
        n: [v.double() for v in value] if isinstance(value, list) else value.double() for n, value in given.items()
    }
    found, true = run_joint(given, "joint"), run_joint(double, "reference")
    assert found.keys() == true.keys()
    if dtype == torch.float64:
        torch.testing.assert_close(found, true, rtol=1e-11, atol=1e-11)
    else:
        agree(found, run_joint(given, "reference"), true)


def test_a_tile_changes_nothing_but_the_time(device: torch.device) -> None:
    """The large one, which needs more rows and columns than these to be the default."""
    given = joint_inputs(2, Case(1, 3, 50, 40, 140, 4), torch.float64, device)
    large, small = forward.tiles_for(torch.float64, 1 << 20, 1 << 20)
    assert forward.tiles_for(torch.float64, 150, 140) == (small, large)
    found = []
    for tile in (small, large):
        with dispatch.trying({("bank_lora", part): str(tile) for part in ("forward", "backward")}) as trial:
            found.append(run_joint(given, "joint"))
        assert trial.offered["bank_lora", "forward"] == [str(small), str(large)]
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


def test_a_part_that_is_not_used_adds_nothing(device: torch.device) -> None:
    given = joint_inputs(3, Case(1, 2, 9, 20, 24, 3), torch.float64, device)
    torch.testing.assert_close(run_joint(given, "joint", unused=1), run_joint(given, "reference", unused=1))


@pytest.mark.parametrize("parts", [1, 3])
def test_a_traced_graph_computes_the_same_through_the_registered_operator(parts: int, device: torch.device) -> None:
    given = joint_inputs(parts, Case(1, 2, 7, 16, 24, 2), torch.float16, device)
    expected = run_joint(given, "joint")
    found = torch.compile(run_joint, backend="aot_eager")(given, "joint")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def operands(device: torch.device, learns: bool, bias: bool, parts: int) -> tuple[Any, ...]:
    given = joint_inputs(parts, Case(2, 2, 7, 16, 24, 2, bias=bias), torch.float32, device)
    none = [None] * (3 - parts)
    x, downs, ups = given["x"], given["a"], given["b"]
    for tensor in (x, *downs, *ups):
        tensor.requires_grad_(learns)
    return x, torch.stack(given["scales"]), given.get("bias"), *given["w"], *none, *downs, *none, *ups, *none


@pytest.mark.parametrize(("learns", "bias", "parts"), [(False, True, 1), (True, False, 1), (True, False, 3)])
def test_torch_knows_the_operator(learns: bool, bias: bool, parts: int, device: torch.device) -> None:
    torch.library.opcheck(torch.ops.lit_kernels.bank_lora, operands(device, learns, bias, parts))


@pytest.mark.parametrize("path", PATHS)
def test_compiles_without_a_graph_break(path: str, device: torch.device) -> None:
    given = inputs(Case(2, 2, 7, 16, 24, 2, bias=True), torch.float32, device)
    expected = run(given, path)
    compiled = torch.compile(applied, fullgraph=True, backend="aot_eager")
    x, a, b = (given[name].detach().requires_grad_() for name in "xab")
    y = compiled(path, x, given["w"], a, b, given["scales"], given["bias"])
    y.backward(given["grad"])
    for name, value in {"y": y.detach(), "dx": x.grad, "da": a.grad, "db": b.grad}.items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, n=name: f"{n}: {m}")


def test_a_weight_that_learns_takes_the_fallback(device: torch.device) -> None:
    given = inputs(Case(2, 2, 7, 16, 40, 2, bias=True), torch.float64, device)
    gradients = []
    for backend in ("auto", "reference"):
        w, bias = (given[name].clone().requires_grad_() for name in ("w", "bias"))
        bank_lora(given["x"], w, given["a"], given["b"], given["scales"], bias, backend).backward(given["grad"])  # type: ignore[arg-type]
        gradients.append((w.grad, bias.grad))
    torch.testing.assert_close(*gradients)
    with pytest.raises(ValueError, match="W or its bias learns; use backend='auto'"):
        bank_lora(given["x"], w, given["a"], given["b"], given["scales"], bias, "triton")


@pytest.mark.parametrize(
    ("adapters", "rows", "learns", "augmented"),
    [(8, 2**17, False, True), (9, 9 * 2**14, False, False), (8, 2**16, False, False), (8, 2**17, True, False)],
)
def test_the_fallback_takes_the_form_that_moves_less(adapters: int, rows: int, learns: bool, augmented: bool) -> None:
    x, w = (torch.empty(count, 256, dtype=torch.bfloat16, device="meta") for count in (rows, 256))
    downs = torch.empty(adapters, 8, 256, device="meta")
    assert fallback.prefers_augmented(x, w.requires_grad_(learns), downs, None) == augmented


@pytest.mark.parametrize("batch", [0, 2])
def test_cases_without_a_kernel_take_the_fallback(batch: int, device: torch.device) -> None:
    """Ranks above 64, and no rows at all."""
    given = inputs(Case(2, batch, 5, 80, 16, 70 if batch else 2), torch.float64, device)
    found, expected = run(given, "auto"), run(given, "reference")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x": (3, 5, 16)}, "15 rows cannot be shared out equally to 2 adapters"),
        ({"x": (2, 5, 15)}, "W [24, 16] does not fit x [2, 5, 15]"),
        ({"b": (2, 24, 3)}, "A [2, 4, 16] and B [2, 24, 3] are not [G, R, 16] and [G, 24, R]"),
        ({"scales": (1,)}, "2 adapters need as many scales, and a bias must be [24]"),
        ({"dtype": torch.bfloat16}, "x is torch.bfloat16, W torch.float32; W and bias must have x's dtype"),
        ({"a": (2, 65, 16), "b": (2, 24, 65), "backend": "triton"}, "rank 65 is above 64; use backend='auto'"),
    ],
)
def test_says_what_does_not_fit(changes: dict[str, Any], said: str) -> None:
    shapes = {"x": (2, 5, 16), "w": (24, 16), "a": (2, 4, 16), "b": (2, 24, 4), "scales": (2,)}
    made = {name: torch.zeros(changes.get(name, shape)) for name, shape in shapes.items()}
    made["x"] = made["x"].to(changes.get("dtype", torch.float32))
    with pytest.raises(ValueError) as caught:
        bank_lora(*made.values(), backend=changes.get("backend", "auto"))
    assert said in str(caught.value)
