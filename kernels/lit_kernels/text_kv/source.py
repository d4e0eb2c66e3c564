"""K and V of a UNet's cross-attention layers, computed once before each of its forward passes.

A hook in front of the UNet's `forward` projects the text for all layers and gives each layer its own. A layer reads
them from its processor, so that compiled blocks are alike whatever their names. Under gradient checkpointing they
travel as diffusers' `cross_attention_kwargs` instead: a block that recomputes its activations in the backward pass is
given the same ones again, and two passes with one text but other adapters do not meet.

Inside `lit_kernels.frozen` the K and V of a text serve all passes without gradients that see it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_kernels.absorbed_attention.layers import KeptText
from lit_kernels.attention.processor import AttentionProcessor, KeyValues
from lit_kernels.backend import Backend
from lit_kernels.packing import lay_side_by_side
from lit_kernels.slices import Projection, projection_of
from lit_kernels.text_kv.function import text_key_values

MAX_TEXTS = 4
"""How many are kept at once: a sampler alternates between two at most; one that makes a new tensor every pass, none."""


class TextKeyValues:
    """A forward pre-hook of a UNet; `clear` is its forward hook.

    Args:
        layers: Cross-attention layers by name, as their processors name them.
        backend: Of `text_key_values`.
        absorbs: Whether layers may be absorbed where a text is kept.
    """

    def __init__(self, layers: Mapping[str, nn.Module], backend: Backend = "auto", absorbs: bool = False):
        self.layers = dict(layers)
        self.backend = backend
        self.absorbs = absorbs
        self._passes: int | None = None
        self._kept: list[KeptText] = []
        self._scales: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}

    def __call__(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[2]
        given = kwargs.get("cross_attention_kwargs") or {}
        strength = given.get("scale", 1.0)  # by which diffusers scales all LoRA layers once the pass has begun
        if self._passes is not None and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            kept = self._keep(text, strength, self._passes)
            for name, key_value in kept.key_values.items():
                self._processor(name).given, self._processor(name).kept = key_value, kept
            return args, kwargs
        found = self.of(text, strength)
        if torch.is_grad_enabled() and getattr(unet, "is_gradient_checkpointing", False):
            return args, {**kwargs, "cross_attention_kwargs": {**given, "key_values": found}}
        for name, key_value in found.items():
            self._processor(name).given = key_value
        return args, kwargs

    def clear(self, unet: nn.Module, args: Any, output: Any) -> None:
        """The pass is over: what was given is of no other."""
        for name in self.layers:
            self._processor(name).given = self._processor(name).kept = None

    @contextlib.contextmanager
    def frozen(self, passes: int) -> Iterator[None]:
        """Keep texts inside this context; see `lit_kernels.frozen`."""
        before, self._passes = self._passes, passes
        try:
            yield
        finally:
            self._passes = before
            if before is None:
                self._kept.clear()

    def _keep(self, text: Tensor, strength: float, passes: int) -> KeptText:
        found = next((kept for kept in self._kept if kept.is_of(text, strength)), None)
        if found is None:
            backend = self.backend if self.absorbs else None
            found = KeptText(text, strength, self.of(text, strength), passes, backend)
            self._kept = [found, *self._kept[: MAX_TEXTS - 1]]
        found.seen += 1
        return found

    def _processor(self, name: str) -> AttentionProcessor:
        layer: Any = self.layers[name]
        return layer.processor  # type: ignore[no-any-return]

    def of(self, text_BSD: Tensor, strength: float = 1.0) -> KeyValues:
        """K and V `[B, S, C]` by layer name; layers that cannot be read are left out and compute their own.

        Args:
            strength: Multiplies the scales of all factors.
        """
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
            scales = self._scales_of(projections, strength, text_BSD.device) if rank else None
            projected = text_key_values(
                text_BSD, [p.weight for p in projections], _factors(projections, "down"), _factors(projections, "up"),
                scales, first_detached, self.backend,
            )  # fmt: skip
            values |= dict(zip((name for name, _ in members), projected, strict=True))
        both = [name for name in self.layers if f"{name}.to_k" in values and f"{name}.to_v" in values]
        return {name: (values[f"{name}.to_k"], values[f"{name}.to_v"]) for name in both}

    def _scales_of(self, projections: list[Projection], strength: float, device: torch.device) -> Tensor:
        """Kept, so that a step copies nothing to the GPU."""
        key = (tuple(p.scale * strength for p in projections), device)
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
