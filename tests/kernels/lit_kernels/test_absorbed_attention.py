"""A cross-attention layer absorbed into its text: every path against the ordinary layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lit_kernels.absorbed_attention import Absorbed, absorb, absorbed_attention, costs, reference, worthwhile

PATHS = ["reference", "fallback", "triton"]


class Case(NamedTuple):
    prompts: int
    samples: int
    tokens: int
    keys: int
    width: int
    heads: int
    head_width: int
    layout: str = "plain"
    own_weights: bool = False


# Every value of one column meets every value of another at least once, in odd shapes.
CASES = [
    Case(1, 1, 1, 1, 24, 1, 16),
    Case(3, 1, 70, 77, 70, 2, 40, "transposed", own_weights=True),
    Case(1, 3, 65, 64, 40, 5, 8, "apart"),
    Case(3, 2, 5, 80, 136, 3, 20, own_weights=True),
    Case(1, 3, 180, 77, 33, 2, 10),  # 540 rows a prompt: the larger tile, the last with 28 of 128
    Case(3, 1, 9, 81, 130, 3, 24, "apart"),
    Case(1, 1, 66, 128, 70, 5, 4, "transposed"),
]


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Of values that every dtype holds exactly, so that all paths begin with the same numbers."""
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int, by: float = 1.0) -> Tensor:
        return (by * torch.randn(*shape, generator=g)).to(torch.bfloat16).to(device, dtype)

    prompts, samples, tokens, keys, width, heads, head_width, layout, own = case
    inner, each = heads * head_width, (prompts,) if own else ()
    x = draw(prompts * samples, tokens, width)
    if layout == "transposed":
        x = x.mT.contiguous().mT
    elif layout == "apart":
        x = torch.cat([x, x + 1], dim=-1)[..., :width]
    return {
        "x": x,
        "key": draw(prompts, keys, inner, by=2.0),
        "value": draw(prompts, keys, inner),
        "query_weight": draw(*each, inner, width, by=width**-0.5),
        "out_weight": draw(*each, width, inner, by=inner**-0.5),
        "out_bias": draw(*each, width),
        "heads": heads,
    }


def layer(given: dict[str, Any]) -> dict[str, Tensor]:
    """What the ordinary layer gives, prompt by prompt."""
    ys = []
    weights = [given[name] for name in ("query_weight", "out_weight", "out_bias")]
    if weights[0].ndim == 2:
        weights = [weight.expand(len(given["key"]), *weight.shape) for weight in weights]
    for p, x in enumerate(given["x"].chunk(len(given["key"]))):
        key, value = (given[name][p].expand(len(x), -1, -1) for name in ("key", "value"))
        own = [weight[p] for weight in weights]
        ys.append(reference.attention_layer(x, key, value, *own[:2], given["heads"], own[2]))
    return {"y": torch.cat(ys)}


def absorbed_of(given: dict[str, Any]) -> Absorbed:
    return absorb(*(given[name] for name in ("key", "value", "query_weight", "out_weight", "heads", "out_bias")))


def run(given: dict[str, Any], path: str) -> dict[str, Tensor]:
    return {"y": absorbed_attention(given["x"], absorbed_of(given), path)}  # type: ignore[arg-type]


def as_double(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in given.items()}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_ordinary_layer_in_double(case: Case, path: str, device: torch.device) -> None:
    given = inputs(case, torch.float64, device)
    torch.testing.assert_close(run(given, path)["y"], layer(given)["y"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", ["fallback", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_errs_no_more_than_the_ordinary_layer(
    case: Case, dtype: torch.dtype, path: str, device: torch.device, agree: Callable[..., None]
) -> None:
    given = inputs(case, dtype, device)
    agree(run(given, path), layer(given), layer(as_double(given)))


@pytest.mark.parametrize("path", ["fallback", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_errs_by_few_units_in_single(case: Case, path: str, device: torch.device) -> None:
    """More than the ordinary layer: sums are over C and N·S terms, not over C, H, S and I."""
    given = inputs(case, torch.float32, device)
    exact = layer(as_double(given))["y"]
    bound = 16 * torch.finfo(torch.float32).eps * exact.abs().max().item()
    torch.testing.assert_close(run(given, path)["y"].double(), exact, rtol=0, atol=bound)


@pytest.mark.parametrize("path", PATHS)
def test_equals_diffusers(path: str, device: torch.device) -> None:
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    theirs = Attention(query_dim=24, cross_attention_dim=20, heads=3, dim_head=8).to(device)
    x, text = torch.randn(2, 9, 24, device=device), torch.randn(2, 7, 20, device=device)
    with torch.no_grad():
        out = theirs.to_out[0]
        absorbed = absorb(
            theirs.to_k(text), theirs.to_v(text), theirs.to_q.weight, out.weight, theirs.heads, out_bias=out.bias
        )
        found = absorbed_attention(x, absorbed, path)  # type: ignore[arg-type]
        torch.testing.assert_close(found, theirs(x, text), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_softmax_is_exact_for_any_scores(path: str, device: torch.device) -> None:
    """What is added to all scores of a row changes nothing; scores in the thousands choose one key."""
    given = inputs(Case(1, 1, 5, 77, 24, 2, 8), torch.float64, device)
    keys, values = absorbed_of(given)
    shifted = Absorbed(keys + 1e3 * torch.linspace(-1, 1, 24, device=device, dtype=torch.float64), values)
    y = absorbed_attention(given["x"], shifted, path)  # type: ignore[arg-type]
    torch.testing.assert_close(y, layer(given)["y"], rtol=1e-9, atol=1e-9)
    given["key"] *= 1e4
    torch.testing.assert_close(run(given, path), layer(given), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_samples_share_a_prompt(path: str, device: torch.device) -> None:
    """The first samples have the first prompt, as if each had a copy of its own."""
    given = inputs(Case(2, 3, 7, 11, 24, 2, 8), torch.float64, device)
    absorbed = absorbed_of(given)
    own = Absorbed(*(part.repeat_interleave(3, dim=0) for part in absorbed))
    shared, apart = (absorbed_attention(given["x"], one, path) for one in (absorbed, own))  # type: ignore[arg-type]
    torch.testing.assert_close(shared, apart, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", ["fallback", "triton"])
def test_a_row_that_is_not_finite_stays_alone(path: str, device: torch.device) -> None:
    given = inputs(CASES[1], torch.float32, device)
    expected = run(given, path)["y"]
    given["x"][1, 3, 5] = float("nan")
    found = run(given, path)["y"]
    same = (found == expected).all(dim=-1)
    assert (~same).nonzero().tolist() == [[1, 3]] and bool(found[1, 3].isnan().all())


@pytest.mark.parametrize("path", ["fallback", "triton"])
def test_two_runs_have_the_same_bits(path: str, device: torch.device) -> None:
    given = inputs(CASES[3], torch.float16, device)
    assert torch.equal(run(given, path)["y"], run(given, path)["y"])


def test_weights_in_fp32_beside_keys_in_bf16_are_not_rounded(device: torch.device) -> None:
    """G and U are rounded once, after the product."""
    given = inputs(CASES[3], torch.bfloat16, device)
    third = {name: given[name].float() / 3 for name in ("query_weight", "out_weight", "out_bias")}
    found, exact = absorbed_of({**given, **third}), absorbed_of({**as_double(given), **third})
    for one, truth in zip(found, exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert ((one.double() - truth).abs() <= truth.abs() * 2**-8 + 1e-6).all()


NAMES = ("key", "value", "query_weight", "out_weight", "out_bias", "x")


@pytest.mark.parametrize("name", NAMES)
def test_refuses_gradients(name: str, device: torch.device) -> None:
    given = inputs(CASES[0], torch.float32, device)
    learns = {**given, name: given[name].requires_grad_()}
    with pytest.raises(RuntimeError, match="absorbed_attention has no gradients and .* requires one; call it under"):
        run(learns, "auto")
    with torch.no_grad():
        assert not run(learns, "auto")["y"].requires_grad
    with torch.inference_mode():
        run(learns, "triton")
    with pytest.raises(RuntimeError, match="and G requires one"):
        absorbed_attention(given["x"].detach(), Absorbed(*(part.clone().requires_grad_() for part in _quietly(learns))))


@torch.no_grad()
def _quietly(given: dict[str, Any]) -> Absorbed:
    return absorbed_of(given)


def test_more_keys_than_the_kernel_takes_take_the_fallback(device: torch.device) -> None:
    given = inputs(Case(1, 2, 5, 129, 24, 2, 8), torch.bfloat16, device)
    assert torch.equal(run(given, "auto")["y"], run(given, "fallback")["y"])
    with pytest.raises(ValueError, match="129 keys are more than 128; use backend='auto'"):
        run(given, "triton")


def test_nothing_gives_nothing(device: torch.device) -> None:
    given = inputs(CASES[0], torch.float32, device)
    for x in (given["x"][:0], given["x"][:, :0]):
        assert run({**given, "x": x}, "auto")["y"].shape == x.shape


def test_torch_knows_the_operator(device: torch.device) -> None:
    given = inputs(Case(2, 1, 5, 7, 24, 2, 8), torch.float32, device)
    keys = absorbed_of(given).keys_PNSC
    torch.library.opcheck(torch.ops.lit_kernels.absorbed_probabilities, (given["x"], keys))


@pytest.mark.parametrize("path", ["fallback", "triton"])
def test_compiles_without_a_graph_break(path: str, device: torch.device) -> None:
    given = inputs(Case(2, 2, 5, 7, 24, 2, 8), torch.float32, device)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(given, path), run(given, path))


@pytest.mark.parametrize(
    ("width", "heads", "ratio"), [(1280, 8, 0.45), (640, 8, 0.86), (320, 8, 1.55), (640, 10, 1.07), (1280, 20, 1.13)]
)
def test_flops_are_those_that_are_counted(width: int, heads: int, ratio: float) -> None:
    """Beside the ordinary layer, with 77 keys; and the same counts from torch, of what runs."""
    from torch.utils.flop_counter import FlopCounterMode

    def counted(call: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as found:
            call()
        return int(found.get_total_flops())

    with torch.device("meta"):
        x, key = torch.empty(2, 64, width), torch.empty(2, 77, width)
        q, absorbed = torch.empty(width, width), Absorbed(*(torch.empty(2, heads, 77, width) for _ in range(2)))
        theirs = counted(lambda: reference.attention_layer(x, key, key, q, q, heads))
        ours = counted(lambda: absorbed_attention(x, absorbed))
        once = counted(lambda: absorb(key, key, q, q, heads))
    assert ours / theirs == pytest.approx(ratio, abs=0.006)
    assert theirs == sum(flop for flop, _ in costs.ordinary(width, 64, 77, prompts=2))
    probabilities, product = (flop for flop, _ in costs.absorbed(width, 64, 77, heads, prompts=2))
    assert ours == probabilities * 77 // 80 + product
    assert once * costs.FP32_FACTOR == sum(flop for flop, _ in costs.absorbing(width, 77, heads, prompts=2))


def test_worthwhile_by_the_model() -> None:
    """SD1.5 with its 8 heads gains where it is wide, SDXL nowhere; absorbing pays after some passes."""
    sd15 = [(1280, 256), (640, 1024), (320, 4096)]
    assert [worthwhile(width, 4 * tokens, 77, 8, passes=30) for width, tokens in sd15] == [True, True, False]
    assert not any(
        worthwhile(width, tokens, 77, width // 64, passes=30) for width, tokens in [(640, 4096), (1280, 1024)]
    )
    assert [worthwhile(1280, 256, 77, 8, passes=passes) for passes in (1, 30)] == [False, True]
    assert [worthwhile(1280, 64, 77, 8, prompts, passes=100) for prompts in (1, 64)] == [True, False]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x": torch.zeros(1, 4, 23)}, "G [2, 2, 7, 24] and U [2, 2, 7, 24] do not fit x [1, 4, 23]"),
        ({"x": torch.zeros(3, 4, 24)}, "3 samples cannot be shared out equally to 2 prompts"),
        ({"x": torch.zeros(2, 4, 24).half()}, "x is torch.float16, G torch.float32 and U torch.float32"),
        ({"heads": 3}, "K [2, 7, 16] and V [2, 7, 16] are not [P, S, I] with I a multiple of 3 heads"),
        ({"query_weight": torch.zeros(15, 24)}, "W_q [15, 24] does not fit K [2, 7, 16]"),
        ({"out_weight": torch.zeros(3, 24, 16)}, "W_o [3, 24, 16] does not fit K [2, 7, 16]"),
    ],
)
def test_says_what_does_not_fit(changes: dict[str, Any], said: str) -> None:
    given = inputs(Case(2, 1, 5, 7, 24, 2, 8), torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError) as caught:
        run({**given, **changes}, "auto")
    assert said in str(caught.value)
