"""Names of layers in the formats of clients.

Inside, a layer is `<component>.<module path>`. Files always carry `text_model.` in text-encoder
keys: transformers flattened one of the two CLIP text classes, clients did not.
"""

from __future__ import annotations

from collections.abc import Iterable

KOHYA_PREFIX = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


def split(layer: str) -> tuple[str, str]:
    component, _, path = layer.partition(".")
    return component, path


def portable(layer: str) -> str:
    """The layer's name in files."""
    component, path = split(layer)
    if component.startswith("text_encoder") and not path.startswith("text_model."):
        path = f"text_model.{path}"
    return f"{component}.{path}"


def kohya(layer: str, two_encoders: bool) -> str:
    """kohya's flat name, `lora_te1`/`lora_te2` where there are two text encoders."""
    component, path = split(portable(layer))
    prefix = "lora_te1" if component == "text_encoder" and two_encoders else KOHYA_PREFIX[component]
    return f"{prefix}_{path.replace('.', '_')}"


def index_by(names: Iterable[str], two_encoders: bool, style: str) -> dict[str, str]:
    """Map a client's name to our layer, for every layer of a base."""
    if style == "kohya":
        return {kohya(name, two_encoders): name for name in names}
    return {portable(name): name for name in names}
