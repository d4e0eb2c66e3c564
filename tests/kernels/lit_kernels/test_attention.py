"""The attention processor against diffusers' own, its slots, and the start-token detach."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0

from lit_kernels.attention import install, reference


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24, attention_head_dim=4, norm_num_groups=8,
    ).eval()  # fmt: skip


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(3, 4, 8, 8, generator=g, dtype=dtype),
        torch.tensor([3, 500, 999]),
        torch.randn(3, 7, 24, generator=g, dtype=dtype),
    )


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_gives_what_diffusers_gives(unet: UNet2DConditionModel, backend: str) -> None:
    z, t, text = _inputs()
    unet.set_attn_processor(AttnProcessor2_0())
    with torch.no_grad():
        expected = unet(z, t, text).sample
        processors = install(unet, backend)  # type: ignore[arg-type]
        found = unet(z, t, text).sample
    assert {p.name for p in processors.values() if p.is_cross} == {n for n in processors if n.endswith("attn2")}
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_install_twice_keeps_slots(unet: UNet2DConditionModel) -> None:
    first = install(unet)
    next(iter(first.values())).detach_first_token = True
    assert install(unet) == first


def test_given_keys_and_values_replace_a_layers_own(unet: UNet2DConditionModel) -> None:
    z, t, text = _inputs()
    layers = {name: unet.get_submodule(name) for name, p in install(unet).items() if p.is_cross}
    with torch.no_grad():
        expected = unet(z, t, text).sample
        own = {name: (attn.to_k(text), attn.to_v(text)) for name, attn in layers.items()}
        found = unet(z, t, text, cross_attention_kwargs={"key_values": own}).sample
        assert torch.equal(found, expected)
        others = {name: (0 * key, 0 * value) for name, (key, value) in own.items()}
        assert not torch.allclose(unet(z, t, text, cross_attention_kwargs={"key_values": others}).sample, expected)


def test_tap_sees_and_may_replace_probabilities(unet: UNet2DConditionModel) -> None:
    z, t, text = _inputs()
    shapes = {}
    with torch.no_grad():
        processors = install(unet)
        expected = unet(z, t, text).sample
        for processor in processors.values():
            processor.tap = lambda p, probabilities: shapes.__setitem__(p.name, probabilities)
        torch.testing.assert_close(unet(z, t, text).sample, expected, atol=2e-5, rtol=1e-4)
        for name, probabilities in shapes.items():
            assert probabilities.shape[-1] == (7 if name.endswith("attn2") else probabilities.shape[-2])
            torch.testing.assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:-1]))
        for processor in processors.values():
            processor.tap = lambda p, probabilities: torch.full_like(probabilities, 1 / probabilities.shape[-1])
        assert not torch.allclose(unet(z, t, text).sample, expected)


@pytest.mark.parametrize(("limit", "called"), [(None, True), (16, True), (15, False)])
def test_a_tap_is_not_called_for_maps_above_its_limit(
    unet: UNet2DConditionModel, limit: int | None, called: bool
) -> None:
    """The attention layers of this UNet have 16 query tokens; what is not tapped stays in fused attention."""
    seen = set()
    processors = install(unet)
    with torch.no_grad():
        expected = unet(*_inputs()).sample
        for processor in processors.values():
            processor.tap, processor.tap_limit = lambda p, probabilities: seen.add((p.name, probabilities.shape)), limit
        found = unet(*_inputs()).sample
    assert {name for name, _ in seen} == (set(processors) if called else set())
    assert all(shape[-2] == 16 for _, shape in seen)
    torch.testing.assert_close(found, expected, atol=2e-5 if called else 0, rtol=1e-4 if called else 0)


def test_detached_first_token_keeps_values_and_cuts_its_gradient(unet: UNet2DConditionModel) -> None:
    """dW_k = Σ_{t>=1} dK_tᵀ c_t and dc_0 = 0 (Custom Diffusion)."""
    unet.double()
    z, t, text = _inputs(torch.float64)
    text.requires_grad_()
    processors = install(unet)
    plain = unet(z, t, text).sample
    grad_plain = torch.autograd.grad(plain.square().sum(), text)[0]
    for processor in processors.values():
        processor.detach_first_token = True
    detached = unet(z, t, text).sample
    torch.testing.assert_close(detached, plain, rtol=0, atol=0)
    grad_detached = torch.autograd.grad(detached.square().sum(), text)[0]
    assert grad_plain[:, 0].abs().max() > 0
    assert grad_detached[:, 0].abs().max() == 0
    torch.testing.assert_close(grad_detached[:, 1:], grad_plain[:, 1:])


def test_detach_leaves_only_later_tokens_in_the_weight_gradient() -> None:
    torch.manual_seed(0)
    text, weight = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 5, 4, dtype=torch.float64)
    key = reference.detach_first_token(text @ weight.T)
    (grad,) = torch.autograd.grad(key, weight, upstream)
    torch.testing.assert_close(grad, torch.einsum("bsc,bse->ce", upstream[:, 1:], text[:, 1:]))


def test_reference_is_softmax_attention_in_fp64() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (5, 7, 7))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(reference.attention(q, k, v), expected, atol=1e-12, rtol=1e-12)
