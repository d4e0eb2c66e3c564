"""AdamW of a bank: every path against torch's own optimizer and clipping, adapter by adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_kernels.bank_adamw import bank_adamw

PATHS = ["reference", "fallback", "triton"]
CHANGED = ("master", "m", "v", "step", "shadow")
INF = float("inf")


def state(
    device: torch.device, dtype: torch.dtype = torch.float32, adapters: int = 4, width: int = 1111
) -> dict[str, Any]:
    """Arguments of one step: adapters differ in everything."""
    g = torch.Generator().manual_seed(2)
    scales = torch.tensor([1e-4, 1.0, 1e-2, 30.0])[:adapters]
    found = {name: torch.randn(adapters, width, generator=g) for name in ("master", "m", "v", "grad")}
    found |= {"v": found["v"].square() / 100, "m": found["m"] / 10, "grad": found["grad"] * scales[:, None]}
    found |= {
        "lr": torch.tensor([1e-4, 1e-2, 0.0, 3e-3])[:adapters],
        "weight_decay": torch.tensor([0.01, 0.0, 0.5, 0.1])[:adapters],
        "max_norm": torch.tensor([1.0, INF, 0.1, 2.0])[:adapters],
    }
    found = {name: value.to(device, dtype) for name, value in found.items()}
    found["step"] = torch.tensor([0, 1, 12345, 7], device=device)[:adapters]
    found["shadow"] = found["master"].bfloat16()
    return found


def step(given: dict[str, Any], path: str, **options: Any) -> Tensor:
    names = ("master", "m", "v", "grad", "lr", "weight_decay", "step", "max_norm")
    return bank_adamw(*(given[name] for name in names), shadow_GP=given["shadow"], backend=path, **options)  # type: ignore[arg-type]


def copied(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() for name, value in given.items()}


def gradients(given: dict[str, Any], count: int = 5) -> list[Tensor]:
    """Of several steps; in the third, one of adapter 1 is infinite."""
    g = torch.Generator().manual_seed(3)
    made = [torch.randn(given["grad"].shape, generator=g).to(given["grad"]) * given["grad"].abs() for _ in range(count)]
    made[2][1, 5] = INF
    return made


def by_torch(given: dict[str, Any], betas: tuple[float, float], eps: float) -> dict[str, Tensor]:
    """Five steps of one real optimizer an adapter."""
    found: dict[str, list[Tensor]] = {name: [] for name in ("master", "m", "v", "step")}
    for i in range(len(given["master"])):
        parameter = torch.nn.Parameter(given["master"][i].clone())
        rates = {"lr": float(given["lr"][i]), "weight_decay": float(given["weight_decay"][i])}
        optimizer = torch.optim.AdamW([parameter], betas=betas, eps=eps, **rates)
        optimizer.state[parameter] = {
            "step": given["step"][i].double(), "exp_avg": given["m"][i].clone(), "exp_avg_sq": given["v"][i].clone(),
        }  # fmt: skip
        for grad in gradients(given):
            parameter.grad = grad[i].clone()
            if torch.nn.utils.clip_grad_norm_([parameter], float(given["max_norm"][i])).isfinite():
                optimizer.step()
        kept = optimizer.state[parameter]
        values = (parameter.detach(), kept["exp_avg"], kept["exp_avg_sq"], kept["step"].long())
        for name, value in zip(found, values, strict=True):
            found[name].append(value)
    return {name: torch.stack(values) for name, values in found.items()}


def by_us(given: dict[str, Any], path: str, betas: tuple[float, float], eps: float) -> dict[str, Tensor]:
    given = copied(given)
    for i, grad in enumerate(gradients(given)):
        skipped = step({**given, "grad": grad}, path, betas=betas, eps=eps)
        assert skipped.tolist() == [False, i == 2, False, False]
    assert torch.equal(given["shadow"], given["master"].bfloat16())
    return {name: given[name] for name in ("master", "m", "v", "step")}


@pytest.mark.parametrize(("betas", "eps"), [((0.9, 0.999), 1e-8), ((0.0, 0.95), 1e-3)])
@pytest.mark.parametrize("path", PATHS)
def test_is_torchs_adamw_in_double(path: str, betas: tuple[float, float], eps: float, device: torch.device) -> None:
    given = state(device, torch.float64)
    found, expected = by_us(given, path, betas, eps), by_torch(given, betas, eps)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("path", PATHS)
def test_errs_no_more_than_torchs_adamw(path: str, device: torch.device, agree: Callable[..., None]) -> None:
    """Adapter by adapter, since their gradients differ by orders of magnitude."""
    given = state(device)
    exact = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    runs = [by_us(given, path, (0.9, 0.999), 1e-8), *(by_torch(of, (0.9, 0.999), 1e-8) for of in (given, exact))]
    steps = [run.pop("step") for run in runs]
    assert torch.equal(steps[0], steps[2])
    for run in runs:
        run["change"] = run.pop("master") - given["master"]
    for g in range(4):
        agree(*({name: value[g] for name, value in run.items()} for run in runs))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [float("nan"), INF, -INF, 1e30])
def test_an_adapter_that_is_not_finite_is_skipped_whole(value: float, path: str, device: torch.device) -> None:
    """Nothing of it moves, and the others keep their bits; the square of 1e30 is not finite in fp32."""
    given = state(device)
    clean, spoiled = copied(given), copied(given)
    spoiled["grad"][1, -1] = value
    assert not step(clean, path).any()
    assert step(spoiled, path).tolist() == [False, True, False, False]
    for name in CHANGED:
        assert torch.equal(spoiled[name][1], given[name][1]), name
        for g in (0, 2, 3):
            assert torch.equal(spoiled[name][g], clean[name][g]), f"{name} of adapter {g}"
    assert all(not torch.equal(clean[name], given[name]) for name in CHANGED)
    assert torch.equal(clean["grad"], given["grad"])


def test_an_adapter_has_the_same_bits_in_a_bank_and_alone(device: torch.device) -> None:
    bank, alone = state(device), state(device)
    step(bank, "triton")
    for g in range(4):
        own = {name: value[g : g + 1] for name, value in alone.items()}
        step(own, "triton")
        for name in CHANGED:
            assert torch.equal(own[name][0], bank[name][g]), f"{name} of adapter {g}"


def test_norms_of_many_parts(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """More blocks than parts, so that a program sums several; the last part is not whole."""
    from lit_kernels.bank_adamw import forward

    monkeypatch.setattr(forward, "PARTS", 4)
    for place in (0, 4000, 9000):
        found = state(device, torch.float64, adapters=2, width=9001)
        found["grad"] /= 1e6
        found["grad"][0, place] = 50.0  # alone decides the norm
        expected = copied(found)
        step(found, "triton")
        step(expected, "reference")
        for name in CHANGED:
            torch.testing.assert_close(found[name], expected[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("path", PATHS)
def test_other_layouts_and_dtypes(path: str, device: torch.device) -> None:
    """Gradients in bf16 and every second column, rates in fp64, no shadow, parameters that learn."""
    found, expected = state(device), state(device)
    wide = torch.zeros(4, 2222, dtype=torch.bfloat16, device=device)
    wide[:, ::2] = found["grad"].bfloat16()
    expected["grad"] = wide[:, ::2].float()
    rates = {name: found[name].double() for name in ("lr", "weight_decay", "max_norm")}
    master = torch.nn.Parameter(found["master"])
    step({**found, **rates, "grad": wide[:, ::2], "master": master, "shadow": None}, path)
    step(expected, "reference")
    for name in ("master", "m", "v", "step"):
        torch.testing.assert_close(found[name], expected[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("path", PATHS)
def test_two_runs_have_the_same_bits(path: str, device: torch.device) -> None:
    first, second = state(device), state(device)
    step(first, path)
    step(second, path)
    assert all(torch.equal(first[name], second[name]) for name in CHANGED)


@pytest.mark.parametrize("shadow", [False, True])
def test_torch_knows_the_operator(shadow: bool, device: torch.device) -> None:
    given = state(device, adapters=2, width=9)
    names = ("master", "m", "v", "grad", "lr", "weight_decay", "step", "max_norm")
    operands = (*(given[name] for name in names), given["shadow"] if shadow else None, 0.9, 0.999, 1e-8)
    torch.library.opcheck(torch.ops.lit_kernels.bank_adamw, operands)


@pytest.mark.parametrize("path", ["fallback", "triton"])
def test_compiles_without_a_graph_break(path: str, device: torch.device) -> None:
    found, expected = state(device), state(device)
    for given in (found, expected):
        given["grad"][1, 0] = INF
    skipped = torch.compile(step, fullgraph=True, backend="aot_eager")(found, path)
    assert torch.equal(skipped, step(expected, path))
    for name in CHANGED:
        torch.testing.assert_close(found[name], expected[name], msg=lambda m, n=name: f"{n}: {m}")


def test_what_the_kernels_cannot_take_takes_the_fallback(device: torch.device) -> None:
    found, expected = state(device), state(device)
    found["m"] = found["m"].T.contiguous().T
    with pytest.raises(ValueError, match="weights, moments or shadow are not contiguous; use backend='auto'"):
        step(found, "triton")
    step(found, "auto")
    step(expected, "fallback")
    assert all(torch.equal(found[name], expected[name]) for name in CHANGED)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"master": torch.zeros(4, 9, dtype=torch.bfloat16)}, "in fp32 or fp64, not [4, 9] in torch.bfloat16"),
        ({"grad": torch.zeros(4, 9)}, "grad is [4, 9], the weights [4, 8]"),
        ({"v": torch.zeros(4, 8, dtype=torch.float64)}, "v is torch.float64, the weights torch.float32"),
        ({"lr": torch.zeros(1)}, "lr is [1], but there are 4 adapters"),
        ({"step": torch.zeros(4)}, "step is torch.float32, it must be int64"),
        ({"betas": (0.9, 1.0)}, "betas must be at least 0 and below 1, not (0.9, 1.0)"),
    ],
)
def test_says_what_does_not_fit(changes: dict[str, Any], said: str) -> None:
    options = {"betas": changes.pop("betas")} if "betas" in changes else {}
    with pytest.raises(ValueError) as caught:
        step({**state(torch.device("cpu"), width=8), **changes}, "auto", **options)
    assert said in str(caught.value)
