"""What a training step does at real size, counted on fake tensors: operators and saved bytes.

    python kernels/benchmarks/counts.py [--size sdxl] [--out kernels/benchmarks/results]

A UNet of SD1.5 or SDXL with LoRA does one forward and backward pass on fake tensors. Every operator that would launch
something is counted (views are not), and every tensor that autograd keeps for the backward pass, once per storage.
Counts are those of the CPU's dispatch; a GPU's differ where its operators do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

SIZES: dict[str, dict[str, Any]] = {
    "sd15": {
        "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
    },
    "sdxl": {
        "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
        "block_out_channels": (320, 640, 1280), "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
        "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"), "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
"""Configurations of stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0, as far as diffusers' defaults differ."""
TARGETS = {
    "none": [],
    "key_value": ["attn2.to_k", "attn2.to_v"],
    "query_value": ["to_q", "to_v"],
    "attention": ["to_q", "to_k", "to_v", "to_out.0"],
}
VIEWS = {
    "view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "split", "split_with_sizes", "slice",
    "select", "unbind", "_unsafe_view", "_reshape_alias", "detach", "alias", "as_strided", "chunk", "unflatten",
    "lift_fresh",
}  # fmt: skip
LAUNCHES = {"bank_lora_backward": 5, "short_key_attention_backward": 5}
"""Launches of our operators at most, where there are several: dX, dA, dB (rank up to 16) or dQ, dK, dV, and sums."""


@dataclass
class Counts:
    """Of one forward and backward pass."""

    operators: Counter[str] = field(default_factory=Counter)
    saved_bytes: int = 0

    @property
    def launches(self) -> int:
        return sum(LAUNCHES.get(name, 1) * count for name, count in self.operators.items())


class _Counting(TorchDispatchMode):
    def __init__(self, into: Counter[str]):
        super().__init__()
        self.into = into

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS and func.namespace != "prim":
            self.into[name] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counting(unet: Any) -> Iterator[Counts]:
    """Count what runs inside; what is saved of the UNet's own weights takes no memory."""
    counts, storages = Counts(), {weight.untyped_storage()._cdata for weight in unet.parameters()}
    kept = []  # a storage that is gone could give its number to another one

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:
            kept.append(storage)
            storages.add(storage._cdata)
            counts.saved_bytes += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _Counting(counts.operators):
        yield counts


def build(size: str, targets: str, rank: int = 8, factors: torch.dtype = torch.float32) -> Any:
    """A UNet in bf16 with LoRA on `targets`, on the meta device."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        unet = UNet2DConditionModel(**SIZES[size]).requires_grad_(False)
        if TARGETS[targets]:
            unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS[targets]))
    finally:
        torch.set_default_dtype(before)
    for module in unet.modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.requires_grad:
            module.weight = torch.nn.Parameter(weight.detach().to(factors))
    return unet


def forward(unet: Any, batch: int = 1) -> torch.Tensor:
    """The prediction at the UNet's native side, for text of 77 tokens."""
    config = unet.config
    side, dtype = config.sample_size, torch.bfloat16
    z = torch.empty(batch, 4, side, side, dtype=dtype)
    z.requires_grad_(not any(parameter.requires_grad for parameter in unet.parameters()))
    text = torch.empty(batch, 77, config.cross_attention_dim, dtype=dtype)
    extra = None
    if config.addition_embed_type:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        extra = {"text_embeds": torch.empty(batch, pooled, dtype=dtype), "time_ids": torch.empty(batch, 6, dtype=dtype)}
    return unet(z, torch.ones(batch, dtype=torch.long), text, added_cond_kwargs=extra).sample  # type: ignore[no-any-return]


def count(size: str, targets: str, prepare: Callable[[Any], Any] = lambda unet: None, **options: Any) -> Counts:
    """Counts of one step after `prepare(unet)`."""
    with torch.device("meta"):
        unet = build(size, targets, **options)
    with FakeTensorMode():
        for module in unet.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    fake = torch.empty(weight.shape, dtype=weight.dtype)
                    module._parameters[name] = torch.nn.Parameter(fake, weight.requires_grad)
        prepare(unet)
        with torch.no_grad():
            forward(unet)  # what is done once is not counted
        with counting(unet) as counts:
            forward(unet).float().mean().backward()
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", action="append", choices=SIZES)
    parser.add_argument("--out", type=Path, help="write counts.json there")
    given = parser.parse_args()
    import lit_kernels

    os.environ["TRITON_INTERPRET"] = "1"  # fake tensors are the CPU's; kernels are counted, none runs
    found = {}
    for size in given.size or SIZES:
        for targets in TARGETS:
            ways: dict[str, Callable[[Any], Any]] = {"stock": lambda unet: None}
            if targets != "none":
                ways["patched"] = lambda unet: lit_kernels.patch(unet, backend="triton")
            for way, prepare in ways.items():
                counts = count(size, targets, prepare)
                found[f"{size} {targets} {way}"] = {"launches": counts.launches, "saved_bytes": counts.saved_bytes}
                saved = f"{counts.saved_bytes / 1e9:6.3f} GB saved"
                print(f"{size:5} {targets:12} {way:8} {counts.launches:7} launches {saved}", flush=True)
    if given.out:
        report = {"torch": torch.__version__.partition("+")[0], "steps": found}
        (given.out / "counts.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
