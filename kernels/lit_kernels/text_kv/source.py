"""K and V of a UNet's cross-attention layers, computed once before each of its forward passes.

A hook in front of the UNet's `forward` projects the text for all layers and gives each layer its own. A layer reads
them from its processor, so that compiled blocks are alike whatever their names. Under gradient checkpointing they
travel as diffusers' `cross_attention_kwargs` instead: a block that recomputes its activations in the backward pass is
given the same ones again, and two passes with one text but other adapters do not meet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_kernels.attention.processor import AttentionProcessor, KeyValues
from lit_kernels.backend import Backend
from lit_kernels.packing import lay_side_by_side
from lit_kernels.slices import Projection, projection_of
from lit_kernels.text_kv.function import text_key_values


class TextKeyValues:
    """A forward pre-hook of a UNet; `clear` is its forward hook.

    Args:
        layers: Cross-attention layers by name, as their processors name them.
        backend: Of `text_key_values`.
    """

    def __init__(self, layers: Mapping[str, nn.Module], backend: Backend = "auto"):
        self.layers = dict(layers)
        self.backend = backend
        self._scales: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}

    def __call__(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[2]
        found = self.of(text)
        if torch.is_grad_enabled() and getattr(unet, "is_gradient_checkpointing", False):
            given = kwargs.get("cross_attention_kwargs") or {}
            return args, {**kwargs, "cross_attention_kwargs": {**given, "key_values": found}}
        for name, key_value in found.items():
            self._processor(name).given = key_value
        return args, kwargs

    def clear(self, unet: nn.Module, args: Any, output: Any) -> None:
        """The pass is over: what was given is of no other."""
        for name in self.layers:
            self._processor(name).given = None

    def _processor(self, name: str) -> AttentionProcessor:
        layer: Any = self.layers[name]
        return layer.processor  # type: ignore[no-any-return]

    def of(self, text_BSD: Tensor) -> KeyValues:
        """K and V `[B, S, C]` by layer name; layers that cannot be read are left out and compute their own."""
        named = [(name, part, getattr(self.layers[name], part)) for name in self.layers for part in ("to_k", "to_v")]
        # All K, then all V, each by width: whichever of the two an adapter changes lies side by side, and so do widths.
        named.sort(key=lambda entry: (entry[1], getattr(entry[2], "out_features", 0)))
        read = {f"{name}.{part}": projection_of(layer) for name, part, layer in named}
        slices = {name: p for name, p in read.items() if isinstance(p, Projection) and p.bias is None}
        _keep_together([projection.weight for projection in slices.values()])
        groups: dict[tuple[int, bool], list[tuple[str, Projection]]] = {}
        for name, projection in slices.items():
            detach = self._processor(name.rpartition(".")[0]).detach_first_token
            groups.setdefault((projection.rank, detach), []).append((name, projection))
        values: dict[str, Tensor] = {}
        for (rank, first_detached), members in groups.items():
            projections = [projection for _, projection in members]
            _keep_together(_factors(projections, "down"))
            _keep_together(_factors(projections, "up"))
            scales = self._scales_of(projections, text_BSD.device) if rank else None
            projected = text_key_values(
                text_BSD, [p.weight for p in projections], _factors(projections, "down"), _factors(projections, "up"),
                scales, first_detached, self.backend,
            )  # fmt: skip
            values |= dict(zip((name for name, _ in members), projected, strict=True))
        both = [name for name in self.layers if f"{name}.to_k" in values and f"{name}.to_v" in values]
        return {name: (values[f"{name}.to_k"], values[f"{name}.to_v"]) for name in both}

    def _scales_of(self, projections: list[Projection], device: torch.device) -> Tensor:
        """Kept, so that a step copies nothing to the GPU."""
        key = (tuple(p.scale for p in projections), device)
        if key not in self._scales:
            self._scales[key] = torch.tensor(key[0], dtype=torch.float32, device=device)
        return self._scales[key]


def _factors(projections: list[Projection], name: str) -> list[Tensor]:
    return [factor for p in projections if (factor := getattr(p, name)) is not None]


def _keep_together(tensors: list[Tensor]) -> None:
    """Lay parameters side by side; once, and again after a move to a device. What is made anew every pass is left."""
    owned = all(isinstance(tensor, nn.Parameter) for tensor in tensors)
    alike = len({(t.dtype, t.device, t.shape[1:]) for t in tensors}) == 1
    if owned and alike and not torch.compiler.is_compiling():
        lay_side_by_side(tensors)
