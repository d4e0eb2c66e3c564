"""Names of layers in the formats of clients.

Inside, a layer is `<component>.<module path>`. Files always carry `text_model.` in text-encoder
keys: transformers flattened one of the two CLIP text classes, clients did not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

KOHYA_PREFIX = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
COMPONENTS = tuple(KOHYA_PREFIX)
PEFT_ROOT = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
"""Of DoRA, in files of PEFT."""
DORA_SCALE = "dora_scale"
"""Likewise, in files of kohya and LyCORIS."""
ATTENTION = re.compile(r"^unet\.(down|mid|up)_blocks?(?:\.(\d+))?\.attentions\.(\d+)\.(.+)$")


def is_magnitude(key: str) -> bool:
    """Whether a file's key is that of a layer's magnitude."""
    return key.removesuffix(".weight").endswith((MAGNITUDE, DORA_SCALE))


def split(layer: str) -> tuple[str, str]:
    component, _, path = layer.partition(".")
    return component, path


def portable(layer: str) -> str:
    """The layer's name in files."""
    component, path = split(layer)
    if component.startswith("text_encoder") and not path.startswith(("text_model.", "text_projection")):
        path = f"text_model.{path}"
    return f"{component}.{path}"


def kohya(layer: str, two_encoders: bool) -> str:
    """kohya's flat name, `lora_te1`/`lora_te2` where there are two text encoders."""
    component, path = split(portable(layer))
    prefix = "lora_te1" if component == "text_encoder" and two_encoders else KOHYA_PREFIX[component]
    return f"{prefix}_{path.replace('.', '_')}"


def original(layer: str, layers_per_block: int) -> str | None:
    """kohya's name of a UNet transformer's layer in the original block numbering, which its SDXL files use.

    None for layers outside the transformers.
    """
    match = ATTENTION.match(layer)
    if match is None:
        return None
    side, block, attention, path = match[1], int(match[2] or 0), int(match[3]), match[4].replace(".", "_")
    if side == "mid":
        return f"lora_unet_middle_block_1_{path}"
    # Down: `layers_per_block` stages and a downsampler after the first convolution. Up: one stage more, no extra.
    number = block * (layers_per_block + 1) + attention
    stage = f"input_blocks_{number + 1}" if side == "down" else f"output_blocks_{number}"
    return f"lora_unet_{stage}_1_{path}"


def index_by(
    names: Iterable[str], two_encoders: bool, style: str, layers_per_block: int | None = None
) -> dict[str, str]:
    """Map a client's name to our layer, for every layer of a base; `style` is "kohya" or "portable"."""
    if style != "kohya":
        return {portable(name): name for name in names}
    index: dict[str, str] = {}
    for name in names:
        index[kohya(name, two_encoders)] = name
        if layers_per_block is not None and (alias := original(name, layers_per_block)):
            index[alias] = name
    return index
