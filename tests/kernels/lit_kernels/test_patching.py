"""`patch` and `unpatch`: the same predictions and gradients as stock diffusers and PEFT, and nothing left behind."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lit_kernels
from lit_kernels.attention import install
from lit_kernels.packing import lay_side_by_side, packed

BACKENDS = ["reference", "fallback", "triton"]
OPS: Any = {"reference": "auto", "fallback": "auto", "triton": ["text_kv"]}
"""Of a backend: the interpreter takes long, so the other kernels have a test of their own, on fewer layers."""
OPERATOR = "lit_kernels::text_key_values"


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24, attention_head_dim=4, norm_num_groups=8,
    ).requires_grad_(False).train()  # fmt: skip


def lora(unet: Any, name: str = "default", targets: tuple[str, ...] = ("to_q", "to_k", "to_v"), **options: Any) -> None:
    options = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, **options}
    unet.add_adapter(LoraConfig(target_modules=list(targets), **options), adapter_name=name)


def step(unet: Any, text: Tensor | None = None) -> dict[str, Tensor]:
    """Prediction "y" and all gradients of one step."""
    g = torch.Generator().manual_seed(1)
    z, target = (torch.randn(2, 4, 8, 8, generator=g) for _ in range(2))
    drawn = torch.randn(2, 7, 24, generator=g)
    text = drawn if text is None else text
    unet.zero_grad()
    y = unet(z, torch.tensor([3, 500]), text).sample
    (y - target).square().mean().backward()
    grads = {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **grads}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


class Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.of[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_patched_unet_learns_what_a_stock_one_does(unet: Any, backend: Any, checkpointing: bool) -> None:
    lora(unet)
    expected = step(unet)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    made = lit_kernels.patch(unet, OPS[backend], backend)
    assert len(made.layers["text_kv"]) == 7 and not made.left
    with Calls() as calls:
        assert_same(step(unet), expected)
    # Blocks that are computed again in the backward pass are given the K and V of the first time.
    assert calls.of[OPERATOR] == (backend == "triton")
    lit_kernels.unpatch(unet)
    assert_same(step(unet), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_come_and_go(unet: Any, backend: Any) -> None:
    """Two adapters at once, of other ranks and strengths; some layers without; all off."""
    x = {}
    for patched in (False, True):
        u = copy.deepcopy(unet)
        if patched:
            lit_kernels.patch(u, OPS[backend], backend)
        with torch.no_grad():
            x[patched, "none"] = {"y": u(torch.ones(1, 4, 8, 8), 3, torch.ones(1, 7, 24)).sample}
        torch.manual_seed(2)
        lora(u, "one", ("to_v",), lora_alpha=1)
        lora(u, "two", ("to_k", "to_v"), r=2)
        u.set_adapters(["one", "two"], [0.5, 2.0])
        x[patched, "both"] = step(u)
        u.disable_adapters()
        with torch.no_grad():
            x[patched, "off"] = {"y": u(torch.ones(1, 4, 8, 8), 3, torch.ones(1, 7, 24)).sample}
    for kind in ("none", "both", "off"):
        assert_same(x[True, kind], x[False, kind])
    assert not torch.equal(x[True, "both"]["y"], x[True, "off"]["y"])


@pytest.mark.parametrize("adapters", [["one"], ["one", "two"]])
def test_a_pass_may_be_given_a_strength(unet: Any, adapters: list[str]) -> None:
    """`cross_attention_kwargs={"scale": s}`, as diffusers' pipelines have it."""
    lora(unet, "one")
    lora(unet, "two", r=2)
    unet.set_adapters(adapters)
    options: Any = {"cross_attention_kwargs": {"scale": 0.5}}
    given = (torch.ones(1, 4, 8, 8), 3, torch.ones(1, 7, 24))
    with torch.no_grad():
        expected = unet(*given, **options).sample
        lit_kernels.patch(unet, backend="fallback")
        torch.testing.assert_close(unet(*given, **options).sample, expected, atol=2e-6, rtol=1e-4)
        assert not torch.allclose(unet(*given).sample, expected, atol=0.01)


def test_other_adapters_on_the_same_text_do_not_meet(unet: Any) -> None:
    """A teacher without adapters sees the very text tensor of the student, whose blocks are recomputed after it."""
    lora(unet)
    unet.enable_gradient_checkpointing()
    z, t, text = torch.ones(1, 4, 8, 8), torch.tensor([3]), torch.ones(1, 7, 24)

    def distill() -> dict[str, Tensor]:
        unet.zero_grad()
        student = unet(z, t, text).sample
        unet.disable_adapters()
        with torch.no_grad():
            teacher = unet(z, t, text).sample
        unet.enable_adapters()
        (student - teacher).square().mean().backward()
        return {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}

    expected = distill()
    lit_kernels.patch(unet, OPS["triton"], "triton")
    assert_same(distill(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_trained_projections_and_the_start_token(unet: Any, backend: Any) -> None:
    """Custom Diffusion: W of K and V learn, token 0 teaches them nothing; and so does the text itself."""
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")))
    for processor in install(unet).values():
        processor.detach_first_token = True
    text = torch.randn(2, 7, 24, requires_grad=True)
    expected = step(unet, text) | {"text": text.grad}
    text.grad = None
    lit_kernels.patch(unet, OPS[backend], backend)
    assert_same(step(unet, text) | {"text": text.grad}, expected)
    assert not text.grad[:, 0].any()


def test_what_it_cannot_read_computes_as_before(unet: Any) -> None:
    lora(unet, targets=("attn2.to_v",), use_dora=True)
    lora(unet, "dropped", ("attn2.to_k",), lora_dropout=0.5)
    unet.set_adapters(["default"])
    expected = step(unet)
    made = lit_kernels.patch(unet, OPS["triton"], "triton")
    assert len(made.left) == 7 and all("not plain LoRA" in why for why in made.left.values())
    assert "left: down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v" in str(made)
    assert_same(step(unet), expected)
    unet.set_adapters(["dropped"])  # while training, dropout is PEFT's business
    with Calls() as calls:
        step(unet)
    assert not calls.of[OPERATOR]
    unet.eval()
    with Calls() as calls:
        step(unet)
    assert calls.of[OPERATOR] == 1


def test_all_kernels_at_once(unet: Any) -> None:
    """LoRA on one layer of each sort, and every cross-attention: also those whose K and V have no factors."""
    block = "mid_block.attentions.0.transformer_blocks.0"
    lora(unet, targets=(f"{block}.attn1.to_out.0", f"{block}.attn2.to_q", f"{block}.attn2.to_k", f"{block}.attn2.to_v"))
    expected = step(unet)
    made = lit_kernels.patch(unet, backend="triton")
    assert made.layers["bank_lora"] == [f"{block}.attn1.to_out.0", f"{block}.attn2.to_q"]
    with Calls() as calls:
        assert_same(step(unet), expected)
    assert calls.of["lit_kernels::bank_lora"] == calls.of["lit_kernels::bank_lora_backward"] == 2
    # Of 7 layers, 3 have heads 4 wide, which the kernels leave to fused attention.
    assert len(made.layers["short_key_attention"]) == 7 and calls.of["lit_kernels::short_key_attention"] == 4
    assert calls.of[OPERATOR] == calls.of[f"{OPERATOR}_backward"] == 1
    # Gates before the first factor learn nothing and pass nothing on.
    assert calls.of["lit_kernels::frozen_geglu"] == 7 and calls.of["lit_kernels::frozen_geglu_backward"] == 5


@pytest.mark.parametrize("parts", [("to_q", "to_k", "to_v"), ("to_q", "to_v"), ("to_k",)])
def test_q_k_and_v_of_self_attention_are_one_launch(unet: Any, parts: tuple[str, ...]) -> None:
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1"
    lora(unet, targets=tuple(f"{attention}.{part}" for part in parts))
    expected = step(unet)
    lit_kernels.patch(unet, ["bank_lora"], "triton")
    with Calls() as calls:
        assert_same(step(unet), expected)
    assert calls.of["lit_kernels::bank_lora"] == calls.of["lit_kernels::bank_lora_backward"] == 1
    assert_same(step(unet), expected)  # and where nobody counts: launched without the registered operator
    lit_kernels.unpatch(unet)
    with Calls() as calls:
        step(unet)
    assert not calls.of["lit_kernels::bank_lora"]


def test_frozen_q_k_and_v_are_one_product(unet: Any) -> None:
    """But not where one of them learns, has a hook, or is watched by the compiler."""
    lora(unet, targets=("attn2.to_v",))
    expected = step(unet)
    attentions = [module for name, module in unet.named_modules() if name.endswith("attn1")]
    products = []
    lit_kernels.patch(unet, ["bank_lora"], "fallback")
    for joint in (False, True):
        for attention in attentions:
            attention.processor.joint = joint
        with Calls() as calls:
            assert_same(step(unet), expected)
        products.append(calls.of["aten::mm"])
    # q, k and v of one layer forward, and backward but for the first, which no factor lies before.
    assert products[0] - products[1] == 2 * (2 * len(attentions) - 1)
    for attention in attentions:
        q, k, v = (getattr(attention, part).weight for part in ("to_q", "to_k", "to_v"))
        assert k.data_ptr() - q.data_ptr() == v.data_ptr() - k.data_ptr() == q.nbytes

    first, second, *others = attentions
    first.to_k.weight.requires_grad_()
    hook = second.to_v.register_forward_hook(lambda _module, _args, _y: None)
    with Calls() as calls, torch.no_grad():
        unet(torch.ones(1, 4, 8, 8), 3, torch.ones(1, 7, 24))
    hook.remove()
    with Calls() as fewer, torch.no_grad():
        unet(torch.ones(1, 4, 8, 8), 3, torch.ones(1, 7, 24))
    assert calls.of["aten::mm"] - fewer.of["aten::mm"] == 2
    assert step(unet).keys() - expected.keys() == {n for n, p in unet.named_parameters() if p is first.to_k.weight}


def test_nothing_is_divided_by_one(unet: Any) -> None:
    lora(unet, targets=("attn2.to_v",))
    expected = step(unet)
    counts = []
    for change in (None, lambda: lit_kernels.patch(unet, []), lambda: lit_kernels.unpatch(unet)):
        if change is not None:
            change()
        with Calls() as calls:
            found = step(unet)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        counts.append(calls.of["aten::div"])
    blocks = sum(type(module).__name__ == "ResnetBlock2D" for module in unet.modules())
    layers = sum(type(module).__name__ == "Attention" for module in unet.modules())
    assert counts[0] == counts[2] > blocks + layers
    assert counts[1] < 5, "of the loss and of the time's frequencies"


def test_layers_with_factors_in_another_dtype_go_alone(unet: Any) -> None:
    """Parts of one launch are pointers of one type, and their gradients come back in one."""
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1"
    lora(unet, targets=(f"{attention}.to_q", f"{attention}.to_k", f"{attention}.to_v"))
    for factors in (unet.get_submodule(f"{attention}.to_k").lora_A, unet.get_submodule(f"{attention}.to_k").lora_B):
        factors["default"].double()
    expected = step(unet)
    lit_kernels.patch(unet, ["bank_lora"], "triton")
    with Calls() as calls:
        assert_same(step(unet), expected)
    assert calls.of["lit_kernels::bank_lora"] == 3


def test_layers_of_other_ranks_go_alone(unet: Any) -> None:
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1"
    lora(unet, targets=(f"{attention}.to_q", f"{attention}.to_k", f"{attention}.to_v"), rank_pattern={"to_k": 5})
    expected = step(unet)
    lit_kernels.patch(unet, ["bank_lora"], "triton")
    with Calls() as calls:
        assert_same(step(unet), expected)
    assert calls.of["lit_kernels::bank_lora"] == 3


def test_switching_adapters_moves_no_weight(unet: Any) -> None:
    """LoRA on V alone: with and without it, all K and V stay where they were laid, and nothing is copied again."""
    lora(unet, targets=("attn2.to_v",))
    lit_kernels.patch(unet, backend="fallback")
    places = set()
    for switch in (unet.enable_adapters, unet.disable_adapters, unet.enable_adapters):
        switch()
        with Calls() as calls, torch.no_grad():
            unet(torch.ones(1, 4, 8, 8), 3, torch.ones(1, 7, 24))
        weights = [p for n, p in unet.named_parameters() if ".attn2.to_" in n and ("to_k" in n or "base_layer" in n)]
        places.add(tuple(p.data_ptr() for p in weights))
    assert len(places) == 1 and len(weights) == 14
    skips = 7  # of the UNet's own, which join the two sides
    assert calls.of["aten::cat"] <= skips + 2, "weights or factors were joined by copying"


def test_what_a_pass_is_given_is_of_no_other(unet: Any) -> None:
    """Neither after a pass, nor after one that failed."""
    lora(unet)
    lit_kernels.patch(unet, backend="fallback")
    step(unet)
    with pytest.raises(RuntimeError):
        unet(torch.ones(1, 5, 8, 8), 3, torch.ones(1, 7, 24))
    assert {processor.given for processor in unet.attn_processors.values()} == {None}


def test_compiled_blocks_are_alike_whatever_their_names(unet: Any) -> None:
    """As many graphs as without kernels: one for each shape of the hidden states."""
    lora(unet)
    graphs, outputs = [], []
    for patched in (False, True):
        if patched:
            lit_kernels.patch(unet, backend="fallback")
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for module in unet.modules():
            if type(module).__name__ == "BasicTransformerBlock":
                module.compile(backend="eager", dynamic=False, fullgraph=True)
        outputs.append(unet(torch.ones(1, 4, 8, 8), torch.tensor([3]), torch.ones(1, 7, 24)).sample)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch.testing.assert_close(*outputs, atol=2e-6, rtol=1e-4)
    assert graphs[0] == graphs[1] < 7


def test_files_and_names_stay_stock(unet: Any, tmp_path: Path) -> None:
    """Names, values and parameter objects; saving works although weights share a storage."""
    before = {name: (id(p), p.detach().clone()) for name, p in unet.named_parameters()}
    lit_kernels.patch(unet)
    step_free = unet(torch.ones(1, 4, 8, 8), 3, torch.ones(1, 7, 24)).sample
    assert {name: id(p) for name, p in unet.named_parameters()} == {name: i for name, (i, _) in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in unet.named_parameters())
    unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(torch.ones(1, 4, 8, 8), 3, torch.ones(1, 7, 24)).sample, step_free)


def test_a_copy_is_patched_by_itself(unet: Any) -> None:
    """Weights of the copy move, those of the original do not follow."""
    lit_kernels.patch(unet)
    given = (torch.ones(1, 4, 8, 8), 3, torch.ones(1, 7, 24))
    expected = unet(*given).sample
    other = copy.deepcopy(unet)
    for name, parameter in other.named_parameters():
        if name.endswith("attn2.to_v.weight"):
            parameter.data.zero_()
    assert not torch.allclose(other(*given).sample, expected)
    torch.testing.assert_close(unet(*given).sample, expected)
    lit_kernels.unpatch(other)
    assert not hasattr(other, "_lit_patch") and hasattr(unet, "_lit_patch")


def test_unpatching_gives_processors_back(unet: Any) -> None:
    stock = [type(processor) for processor in unet.attn_processors.values()]
    hooks = len(unet._forward_pre_hooks)
    lit_kernels.patch(unet)
    lit_kernels.unpatch(unet)
    lit_kernels.unpatch(unet)
    assert [type(processor) for processor in unet.attn_processors.values()] == stock
    assert len(unet._forward_pre_hooks) == hooks


class Theirs(AttnProcessor2_0):
    pass


def test_says_what_it_cannot_patch(unet: Any) -> None:
    with pytest.raises(ValueError, match="unknown operator 'text'; there are text_kv, short_key_attention"):
        lit_kernels.patch(unet, ops=["text"])  # type: ignore[list-item]
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(Theirs())
    with pytest.raises(ValueError, match="mid_block.*attn2 has a Theirs; remove it before patching"):
        lit_kernels.patch(unet)
    unet.set_attn_processor(AttnProcessor2_0())
    lit_kernels.patch(unet)
    with pytest.raises(ValueError, match="call lit_kernels.unpatch"):
        lit_kernels.patch(unet)


def test_packing_moves_tensors_once_and_copies_nothing() -> None:
    parts = [torch.nn.Parameter(torch.randn(n, 3)) for n in (2, 1, 4)]
    expected = torch.cat(list(parts)).detach()
    apart = packed(parts)
    assert torch.equal(apart, expected) and apart.data_ptr() != parts[0].data_ptr()
    whole = lay_side_by_side(parts)
    together = packed(parts)
    assert torch.equal(together, expected) and together.data_ptr() == whole.data_ptr() == parts[0].data_ptr()
    assert lay_side_by_side(parts).data_ptr() == whole.data_ptr()
    (together * torch.arange(21).view(7, 3)).sum().backward()
    assert torch.equal(torch.cat([p.grad for p in parts]), torch.arange(21.0).view(7, 3))
    with pytest.raises(RuntimeError):
        lay_side_by_side([torch.zeros(2, 3), torch.zeros(2, 4)])
    assert packed(list(reversed(parts))).data_ptr() != whole.data_ptr()
