"""PEFT's OFT folders: rotations `oft_R [r, b(b-1)/2]` of layers' inputs, beside their `adapter_config.json`.

Two traps of the format. With `use_cayley_neumann`, PEFT's default, the same numbers turn the other way: its series is
that of (I + S)(I - S)⁻¹, and only nearly orthogonal. And with `coft` the client shrinks the blocks when it applies
them, by a radius that leaves out the authors' b². What is written here says False to both; what others wrote is read
as PEFT would apply it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_personalize import atomic
from lit_personalize.adapters.oft import block_size, project, rotated_change, skew, turn
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.errors import DataError
from lit_personalize.export import keys
from lit_personalize.export.files import write_safetensors

MARK = ".oft_R."
"""In the key of every rotation: `<layer>.oft_R.weight`."""


def write_oft(folder: Path, rotations: Mapping[str, Tensor], component: str, metadata: Mapping[str, str]) -> Path:
    """Write one component's rotations, which all have as many blocks, for `PeftModel.from_pretrained`."""
    from peft import OFTConfig

    own = {keys.split(layer)[1]: upper for layer, upper in rotations.items() if keys.split(layer)[0] == component}
    (blocks,) = {len(upper) for upper in own.values()}
    config = OFTConfig(
        r=blocks, oft_block_size=0, target_modules=sorted(own), inference_mode=True, coft=False,
        use_cayley_neumann=False,
    ).to_dict()  # fmt: skip
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    tensors = {f"{keys.PEFT_ROOT}{path}{MARK}weight": upper for path, upper in own.items()}
    write_safetensors(folder / "adapter_model.safetensors", tensors, {**metadata, "litp.component": component})
    atomic.write_text(folder / "adapter_config.json", json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n")
    return folder


def parse_rotations(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path
) -> AdapterWeights:
    """ΔW of every rotated layer, as PEFT applies it; the blocks too where they mean an exact Cayley transform.

    Args:
        tensors: By our layer names.
        settings: Of `adapter_config.json`, by option.
        weights: W0 of every layer of the base.

    Raises:
        DataError: A layer that is no linear one, or blocks that do not fit its input.
    """
    found = AdapterWeights()
    for layer, upper in tensors.items():
        weight = weights[layer]
        b = block_size(upper)
        if upper.ndim != 2 or weight.ndim != 2 or b * (b - 1) // 2 != upper.shape[1] or weight.shape[1] % b:
            raise DataError(
                f"{path}: {layer} has oft_R {tuple(upper.shape)} for a weight {tuple(weight.shape)}; it takes "
                "[r, b(b-1)/2] with r·b inputs, as PEFT writes it for linear layers since 0.14"
            )
        if settings.get("coft"):
            upper = project(upper, float(settings.get("eps", 6e-5)) / math.sqrt(len(upper)))
        if settings.get("block_share"):
            upper = upper.expand(weight.shape[1] // b, -1)
        if len(upper) * b != weight.shape[1]:
            raise DataError(f"{path}: {layer} has {len(upper)} blocks of {b} inputs, the base has {weight.shape[1]}")
        weight = weight.detach().cpu()
        if settings.get("use_cayley_neumann"):
            series = neumann_change(upper.double(), int(settings.get("num_cayley_neumann_terms", 5)))
            found.dense[layer] = rotated_change(weight.double(), series).float()
        else:
            found.rotations[layer] = upper.float().contiguous()
            found.dense[layer] = turn(weight, upper)
    return found


def neumann_change(upper: Tensor, terms: int) -> Tensor:
    """PEFT's R - I `[r, b, b]` under `use_cayley_neumann`: 2S + 2S² + ... + Sⁿ⁻¹ of n `terms` (three are as four)."""
    s = skew(upper)
    last = terms - 1 if terms <= 2 else max(terms - 1, 3)
    power, total = s, torch.zeros_like(s)
    for degree in range(1, last + 1):
        total = total + (1 if degree == last > 1 else 2) * power
        power = power @ s
    return total
