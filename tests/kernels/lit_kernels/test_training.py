"""Training with kernels is training without them: a tiny base, PEFT's LoRA on every attention layer, 50 steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

import lit_kernels
from lit_personalize.backbones.tiny import write_tiny_base

STEPS = 50


def train(folder: Path, backend: Any) -> tuple[list[float], torch.Tensor]:
    """Losses of 50 steps on two samples, and the product B A of every layer in one vector."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").requires_grad_(False).train()
    unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    if backend is not None:
        lit_kernels.patch(unet, backend=backend)
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=5e-3)
    g = torch.Generator().manual_seed(1)
    text = torch.randn(2, 9, unet.config.cross_attention_dim, generator=g)
    z, target = (torch.randn(2, 4, 16, 16, generator=g) for _ in range(2))
    losses = []
    for _ in range(STEPS):
        out = unet(z, torch.tensor([3, 700]), text).sample
        loss = (out - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    layers = [m for m in unet.modules() if hasattr(m, "lora_A")]
    changes = [m.lora_B["default"].weight @ m.lora_A["default"].weight for m in layers]
    return losses, torch.cat([change.detach().flatten() for change in changes])


@pytest.mark.parametrize("backend", ["fallback", "triton"])
def test_fifty_steps_are_those_of_peft(backend: str, tmp_path: Path) -> None:
    write_tiny_base(tmp_path)
    expected, change = train(tmp_path, None)
    losses, found = train(tmp_path, backend)
    assert expected[-1] < 0.95 * expected[0] and change.norm() > 0.5, "nothing was learned, so nothing is compared"
    assert losses == pytest.approx(expected, rel=3e-4)
    assert torch.nn.functional.cosine_similarity(found, change, dim=0) > 0.9999
