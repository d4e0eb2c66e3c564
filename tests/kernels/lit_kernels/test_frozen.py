"""`frozen`: passes that see one text again give what they gave, from kept K and V and absorbed layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

import lit_kernels
from lit_kernels.absorbed_attention import layers as absorbing
from lit_kernels.text_kv import source

PARTS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture
def unet() -> UNet2DConditionModel:
    """LoRA on every projection; 7 cross-attentions, of 256, 64 and 16 image tokens."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24, attention_head_dim=4, norm_num_groups=8,
    ).requires_grad_(False).eval()  # fmt: skip
    unet.add_adapter(LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, target_modules=list(PARTS)))
    return unet


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often texts were projected, layers absorbed, and absorbed layers used."""
    found = {"projected": 0, "absorbed": 0, "used": 0}

    def counting(name: str, function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(source, "text_key_values", counting("projected", source.text_key_values))
    monkeypatch.setattr(absorbing, "absorb", counting("absorbed", absorbing.absorb))
    monkeypatch.setattr(absorbing, "absorbed_attention", counting("used", absorbing.absorbed_attention))
    return found


@torch.no_grad()
def predict(unet: Any, text: Tensor, seed: int = 0) -> Tensor:
    z = torch.randn(len(text), 4, 16, 16, generator=torch.Generator().manual_seed(seed)).to(text.dtype)
    return unet(z, 500, text).sample  # type: ignore[no-any-return]


def two_prompts(samples: int = 4) -> Tensor:
    """Of a guided sampler: half of the samples are told one thing, half another."""
    texts = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))
    return texts.repeat_interleave(samples // 2, dim=0)


@pytest.mark.parametrize("backend", ["fallback", "reference", "triton"])
def test_the_same_predictions(unet: Any, backend: Any, counts: dict[str, int]) -> None:
    text = two_prompts(2 if backend == "triton" else 4)
    expected = [predict(unet, text, seed) for seed in range(3)]
    lit_kernels.patch(unet, ["text_kv", "absorbed_attention"], backend)
    with lit_kernels.frozen(unet, 1000):
        found = [predict(unet, text, seed) for seed in range(3)]
    for y, same in zip(found, expected, strict=True):
        torch.testing.assert_close(y, same, atol=5e-6, rtol=1e-4)
    assert counts["projected"] == 1
    # Heads are 4, 8 and 8 wide: absorbing the layers of 16 tokens is modelled to cost more than it saves.
    assert 0 < counts["absorbed"] <= 7 and counts["used"] == 2 * counts["absorbed"]
    torch.testing.assert_close(predict(unet, text), expected[0], atol=5e-6, rtol=1e-4)
    assert counts["projected"] == 2, "after the context nothing is kept"


def test_absorbing_waits_for_the_second_pass_and_for_its_worth(unet: Any, counts: dict[str, int]) -> None:
    lit_kernels.patch(unet, backend="fallback")
    with lit_kernels.frozen(unet, 1000):
        predict(unet, two_prompts())
        predict(unet, two_prompts())  # another tensor, if of the same values
        assert counts["projected"] == 2 and not counts["absorbed"]
    text = two_prompts()
    with lit_kernels.frozen(unet, 1):  # absorbed for one pass, a layer has cost more than it gave
        predict(unet, text)
        predict(unet, text)
    assert counts["projected"] == 3 and not counts["absorbed"]


def test_auto_absorbs_nothing_where_the_kernels_do_not_run(unet: Any, counts: dict[str, int]) -> None:
    lit_kernels.patch(unet)
    text = two_prompts()
    with lit_kernels.frozen(unet, 1000):
        predict(unet, text)
        predict(unet, text)
    assert counts == {"projected": 1, "absorbed": 0, "used": 0}


@pytest.mark.parametrize(("rows", "prompts"), [((0, 0, 1, 1), 2), ((0, 0, 0, 0), 1), ((0, 1, 0, 1), 4), ((0, 0, 1), 3)])
def test_samples_share_a_prompt_where_their_texts_are_equal(rows: tuple[int, ...], prompts: int) -> None:
    texts = torch.randn(2, 7, 24)
    kept = absorbing.KeptText(texts[list(rows)], 1.0, {}, 10, "fallback")
    assert kept._number_of_prompts() == prompts


def test_passes_with_gradients_and_other_texts_are_their_own(unet: Any, counts: dict[str, int]) -> None:
    text, other = two_prompts(), two_prompts().flip(0).contiguous()
    expected = predict(unet, other)
    factors = [p for name, p in unet.named_parameters() if "attn2.to_v.lora_B" in name]
    for factor in factors:
        factor.requires_grad_()
    lit_kernels.patch(unet, backend="fallback")
    with lit_kernels.frozen(unet, 1000):
        for _ in range(2):
            predict(unet, text)
            torch.testing.assert_close(predict(unet, other), expected, atol=5e-6, rtol=1e-4)
        before = dict(counts)
        unet(torch.ones(4, 4, 16, 16), 500, text).sample.square().mean().backward()
    assert all(factor.grad is not None and factor.grad.any() for factor in factors)
    assert counts["used"] == before["used"] and counts["projected"] == before["projected"] + 1


def absorbed_layers(unet: Any) -> set[str]:
    """Names of those that are absorbed in the second pass."""
    text = two_prompts()
    with lit_kernels.frozen(unet, 1000):
        predict(unet, text)
        predict(unet, text)
        (kept,) = unet._lit_patch.source._kept
        return {name for name, found in kept._layers.items() if found is not None}


def test_layers_that_are_more_than_their_projections_stay(unet: Any) -> None:
    """A tap wants probabilities; dropout is drawn anew; factors of DoRA are no plain LoRA."""
    lit_kernels.patch(unet, backend="fallback")
    first, second, third, *others = sorted(absorbed_layers(unet))
    taps: list[Tensor] = []
    unet.attn_processors[f"{first}.processor"].tap = lambda _, probabilities: taps.append(probabilities)
    unet.get_submodule(f"{second}.to_out.1").train().p = 0.5
    targets = [f"{third}.to_q"]
    unet.add_adapter(LoraConfig(r=2, use_dora=True, target_modules=targets), adapter_name="dora")
    unet.set_adapters(["default", "dora"])
    assert absorbed_layers(unet) == set(others)
    assert len(taps) == 2


def test_another_strength_is_another_text(unet: Any, counts: dict[str, int]) -> None:
    text, z = two_prompts(), torch.ones(4, 4, 16, 16)
    kwargs: list[Any] = [{}, {"cross_attention_kwargs": {"scale": 0.5}}]
    with torch.no_grad():
        expected = [unet(z, 500, text, **options).sample for options in kwargs]
        lit_kernels.patch(unet, backend="fallback")
        with lit_kernels.frozen(unet, 1000):
            for _ in range(2):
                for options, y in zip(kwargs, expected, strict=True):
                    torch.testing.assert_close(unet(z, 500, text, **options).sample, y, atol=5e-6, rtol=1e-4)
    assert not torch.allclose(*expected, atol=0.1)
    assert counts["projected"] == 2 and counts["used"]


def test_masked_text_is_not_absorbed(unet: Any, counts: dict[str, int]) -> None:
    text, mask = two_prompts(), torch.tensor([1, 1, 1, 1, 0, 0, 0]).expand(4, 7)
    z = torch.ones(4, 4, 16, 16)
    with torch.no_grad():
        expected = unet(z, 500, text, encoder_attention_mask=mask).sample
        lit_kernels.patch(unet, backend="fallback")
        with lit_kernels.frozen(unet, 1000):
            for _ in range(2):
                found = unet(z, 500, text, encoder_attention_mask=mask).sample
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=1e-4)
    assert counts["projected"] == 1 and not counts["used"]


def test_memory_is_given_back(unet: Any) -> None:
    lit_kernels.patch(unet, backend="fallback")
    made = unet._lit_patch.source
    with pytest.raises(ZeroDivisionError), lit_kernels.frozen(unet, 1000):
        with lit_kernels.frozen(unet, 5):
            for _ in range(source.MAX_TEXTS + 3):
                predict(unet, two_prompts())
        assert len(made._kept) == source.MAX_TEXTS
        raise ZeroDivisionError
    assert not made._kept and {processor.kept for processor in unet.attn_processors.values()} == {None}


def test_says_what_is_wrong(unet: Any) -> None:
    with pytest.raises(ValueError, match="absorbed_attention is made of the K and V that text_kv gives"):
        lit_kernels.patch(unet, ["absorbed_attention"])
    with pytest.raises(ValueError, match="at least 1 pass, not 0"), lit_kernels.frozen(unet, 0):
        pass
    with lit_kernels.frozen(unet):  # it is not patched, and computes as it is
        predict(unet, two_prompts())
