"""PEFT's layers for an adapter of ours, beside those that are there."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def inject(config: Any, module: nn.Module, name: str) -> None:
    """Have PEFT wrap the layers that `config` targets; adapters that were there stay on, or off, as they were.

    PEFT alone switches off every adapter but the one that it injects. Nothing is drawn from torch's global generator.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    before = {id(layer): list(layer.active_adapters) for layer in module.modules() if isinstance(layer, LoraLayer)}
    # PEFT moves its own factors to a layer's device, which fake tensors refuse; ours take their place.
    with torch.random.fork_rng(devices=[]), unset_fake_temporarily():
        inject_adapter_in_model(config, module, adapter_name=name)
    for layer in module.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter([*before.get(id(layer), ()), *([name] if name in layer.lora_A else ())])
