"""Adapters moved away from their start, for exports of every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_personalize.adapters.key_value_delta import KeyValueDelta
from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.protocol import Adapter, AdapterWeights
from lit_personalize.adapters.token_embedding import TokenEmbedding
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base

Train = Callable[[Path, list[Adapter]], tuple[Base, AdapterWeights]]


@pytest.fixture
def everything() -> list[Adapter]:
    """Low rank with alpha != rank on UNet and text, dense K and V (some on the same UNet), a token of three rows."""
    lora = LoRA(rank=3, alpha=6.0, targets=["attn1.to_q", "attn1.to_v"], text_encoder=True)
    return [lora, KeyValueDelta(), TokenEmbedding("<new1>", "cat", vectors=3)]


@pytest.fixture
def train() -> Train:
    """Attach adapters to a fresh base and move every factor, as training would."""

    def trained(path: Path, adapters: list[Adapter]) -> tuple[Base, AdapterWeights]:
        base = load_base(path)
        weights = AdapterWeights()
        draws = torch.Generator().manual_seed(0)
        for adapter in adapters:
            adapter.attach(base)
            with torch.no_grad():
                for factor in adapter.named_factors().values():
                    factor.add_(0.1 * torch.randn(factor.shape, generator=draws))
            adapter.refresh(base.dtype)
            weights = weights.merge(adapter.export_weights())
        return base, weights

    return trained
