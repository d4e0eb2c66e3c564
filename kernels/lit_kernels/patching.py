"""`patch(unet)`: the operators of this package inside any diffusers UNet, with or without PEFT, until `unpatch(unet)`.

Nothing of the UNet's state changes: parameters stay the same objects under the same names, and files that are saved
from a patched UNet are those of a stock one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn

from lit_kernels import dispatch, resnets
from lit_kernels.attention.processor import AttentionProcessor, install
from lit_kernels.backend import Backend, why_not_triton
from lit_kernels.bank_lora import layers as lora_layers
from lit_kernels.frozen_geglu import layers as gate_layers
from lit_kernels.slices import projection_of
from lit_kernels.text_kv.source import TextKeyValues

Operator = Literal["text_kv", "short_key_attention", "bank_lora", "frozen_geglu", "absorbed_attention"]
STOCK = ("AttnProcessor", "AttnProcessor2_0")


@dataclass
class Patch:
    """What was put into a UNet, and what undoes it."""

    layers: dict[str, list[str]] = field(default_factory=dict)
    """By operator, the layers that it serves."""
    left: dict[str, str] = field(default_factory=dict)
    """Layers that compute as before, and why."""
    processors: dict[str, Any] = field(default_factory=dict)
    """Processors that were there before, where they were not ours."""
    hooks: list[Any] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    """Residual blocks that no longer divide by 1."""
    source: TextKeyValues | None = None
    """Of K and V, with `text_kv`."""

    def __str__(self) -> str:
        lines = [f"{operator}: {len(names)} layers" for operator, names in self.layers.items()]
        return "\n".join([*lines, *(f"left: {name} ({why})" for name, why in self.left.items())])


def patch(unet: nn.Module, ops: Literal["auto"] | Sequence[Operator] = "auto", backend: Backend = "auto") -> Patch:
    """Let a UNet of SD1, SD2 or SDXL use the operators `ops`; "auto" means all of them.

    Layers are read anew in every forward pass: adapters may change, be switched and scaled afterwards. A layer that
    carries something else than plain LoRA (DoRA, dropout while training) computes as before. LoRA layers that are
    added later compute as PEFT does, but for K and V of the text. `absorbed_attention` waits for `frozen`.

    Raises:
        ValueError: An unknown operator, one without that which it needs, a UNet that is patched already, or one with
            attention processors of others (IP-Adapter, custom ones), which this would silently replace; a table of this
            GPU that cannot be read.
    """
    wanted = list(get_args(Operator)) if ops == "auto" else list(ops)
    if unknown := [name for name in wanted if name not in get_args(Operator)]:
        raise ValueError(f"unknown operator {unknown[0]!r}; there are {', '.join(get_args(Operator))}")
    if "absorbed_attention" in wanted and "text_kv" not in wanted:
        raise ValueError("absorbed_attention is made of the K and V that text_kv gives: add 'text_kv' to ops")
    if hasattr(unet, "_lit_patch"):
        raise ValueError("this UNet is patched; call lit_kernels.unpatch(unet) first")
    if getattr(unet, "encoder_hid_proj", None) is not None:
        raise ValueError("this UNet projects its text first (encoder_hid_proj: IP-Adapter and the like)")
    if backend == "triton" and (reason := why_not_triton(next(unet.parameters()).device)):
        raise ValueError(reason)
    dispatch.check(next(unet.parameters()).device)
    made = Patch(processors=_foreign_processors(unet))
    processors = install(unet)
    cross = {name: unet.get_submodule(name) for name, p in processors.items() if p.is_cross}
    if "text_kv" in wanted:
        made.layers["text_kv"] = list(cross)
        for name, layer in cross.items():
            for part in ("to_k", "to_v"):
                if isinstance(found := projection_of(getattr(layer, part)), str):
                    made.left[f"{name}.{part}"] = found
        made.source = source = TextKeyValues(cross, backend, absorbs="absorbed_attention" in wanted)
        made.hooks.append(unet.register_forward_pre_hook(source, with_kwargs=True))
        made.hooks.append(unet.register_forward_hook(source.clear, always_call=True))
        if source.absorbs:
            made.layers["absorbed_attention"] = list(cross)
    if "short_key_attention" in wanted:
        made.layers["short_key_attention"] = list(cross)
        for name in cross:
            processors[name].short_keys = backend
    if "bank_lora" in wanted:
        texts = {f"{name}.{part}" for name in made.layers.get("text_kv", ()) for part in ("to_k", "to_v")}
        made.layers["bank_lora"] = []
        for name, layer in unet.named_modules():
            if not hasattr(layer, "lora_A") or name in texts - made.left.keys():
                continue
            if isinstance(found := projection_of(layer), str):
                made.left.setdefault(name, found)
                continue
            lora_layers.fuse(layer, backend)
            made.layers["bank_lora"].append(name)
        for processor in processors.values():
            processor.joint = not processor.is_cross
    if "frozen_geglu" in wanted:
        gates = gate_layers.gates_of(unet)
        made.layers["frozen_geglu"] = list(gates)
        for gate in gates.values():
            gate_layers.fuse(gate, backend)
    for name, block in resnets.plain_blocks_of(unet).items():
        resnets.shorten(block)
        made.blocks.append(name)
    object.__setattr__(unet, "_lit_patch", made)
    return made


def unpatch(unet: nn.Module) -> None:
    """Undo `patch`; a UNet that is not patched stays as it is."""
    made: Patch | None = unet.__dict__.pop("_lit_patch", None)
    if made is None:
        return
    for hook in made.hooks:
        hook.remove()
    for processor in install(unet).values():
        processor.short_keys, processor.joint = None, False
    for name in made.layers.get("bank_lora", ()):
        lora_layers.unfuse(unet.get_submodule(name))
    for name in made.layers.get("frozen_geglu", ()):
        gate_layers.unfuse(unet.get_submodule(name))
    for name in made.blocks:
        resnets.restore(unet.get_submodule(name))
    for name, processor in made.processors.items():
        unet.get_submodule(name).set_processor(processor)  # type: ignore[operator]


@contextlib.contextmanager
def frozen(unet: nn.Module, passes: int = 25) -> Iterator[None]:
    """Inside, what a text becomes is kept: for samplers, scores of many trials, teachers.

    Passes without gradients that are given the same text tensor compute its K and V once, and from the second pass on
    take cross-attention absorbed where that pays: on a GPU with `backend="auto"`, by `costs.worthwhile` and the GPU's
    table. The caller promises that until the end neither weights nor adapters change, nor the values of a text tensor
    that was given; passes with gradients compute as ever. A UNet that is not patched computes as it is.

    Args:
        passes: How many passes will be given the same text: the number of a sampler's steps.

    Raises:
        ValueError: Fewer than 1 pass.
    """
    if passes < 1:
        raise ValueError(f"frozen: a text needs at least 1 pass, not {passes}")
    made: Patch | None = unet.__dict__.get("_lit_patch")
    with contextlib.nullcontext() if made is None or made.source is None else made.source.frozen(passes):
        yield


def _foreign_processors(unet: nn.Module) -> dict[str, Any]:
    found = {}
    for name, module in unet.named_modules():
        processor = getattr(module, "processor", None)
        if processor is None or isinstance(processor, AttentionProcessor):
            continue
        if type(processor).__name__ not in STOCK:
            raise ValueError(f"{name} has a {type(processor).__name__}; remove it before patching")
        found[name] = processor
    return found
