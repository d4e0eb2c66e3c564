"""Training with kernels is training without them: 50 steps of PEFT's LoRA on a tiny base, one operator after another.

The interpreter takes some 20 ms for every launch: `test_patching.py` compares all operators at once, over one step.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

import lit_kernels

STEPS = 50
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def tiny() -> Any:
    """One transformer block between two resnets."""
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32,),
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), cross_attention_dim=24,
        attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip


def train(targets: list[str], ops: Any, backend: Any) -> tuple[list[float], torch.Tensor]:
    """Losses of 50 steps on one sample, and the product B A of every layer in one vector."""
    torch.manual_seed(0)
    unet = tiny().requires_grad_(False).train()
    unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=targets))
    if ops:
        made = lit_kernels.patch(unet, ops, backend)
        assert all(made.layers.values()) and not made.left
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=5e-3)
    g = torch.Generator().manual_seed(1)
    text = torch.randn(1, 9, unet.config.cross_attention_dim, generator=g)
    z, target = (torch.randn(1, 4, 8, 8, generator=g) for _ in range(2))
    losses = []
    for _ in range(STEPS):
        out = unet(z, torch.tensor([700]), text).sample
        loss = (out - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    layers = [m for m in unet.modules() if hasattr(m, "lora_A")]
    changes = [m.lora_B["default"].weight @ m.lora_A["default"].weight for m in layers]
    return losses, torch.cat([change.detach().flatten() for change in changes])


@pytest.mark.parametrize(
    ("targets", "ops", "backend"),
    [
        (ATTENTION, "auto", "fallback"),
        (["attn2.to_k", "attn2.to_v"], ["text_kv"], "triton"),
        (["attn2.to_k", "attn2.to_v"], ["short_key_attention"], "triton"),
        (["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"], ["bank_lora", "frozen_geglu"], "triton"),
    ],
)
def test_fifty_steps_are_those_of_peft(targets: list[str], ops: Any, backend: str) -> None:
    expected, change = train(targets, None, None)
    losses, found = train(targets, ops, backend)
    assert expected[-1] < expected[0] - 1e-3 and change.norm() > 0.1, "nothing was learned, so nothing is compared"
    assert losses == pytest.approx(expected, rel=3e-4)
    assert torch.nn.functional.cosine_similarity(found, change, dim=0) > 0.9999
