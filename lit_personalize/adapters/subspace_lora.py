"""LoRA in the space of a corpus: coefficients are all that trains (Dravid et al., 2024, arXiv 2406.09413, sec. 3.5).

θ = (β V) · deviation + mean, and the slices of θ are the factors A and B of every layer: y = W0 x + s·B(β)·A(β)·x. θ is
one product of β `[k]` with V `[k, D]` a step, and its backward another: dβ = (dθ · deviation) Vᵀ. β = 0 is the mean
adapter.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lit_personalize.adapters.injection import inject
from lit_personalize.adapters.layer_selection import exactly
from lit_personalize.adapters.protocol import Adapter, AdapterWeights, LowRank
from lit_personalize.backbones.base import Base
from lit_personalize.errors import DataError, UsageError

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

    from lit_personalize.corpus.layout import Layout

BETA = "beta"
COMPONENTS = 10_000


class SubspaceLoRA(Adapter):
    """Finds an adapter among those that the components of a corpus span.

    Args:
        space: Folder of `litp w2w fit`, of a corpus of this base.
        components: k, how many of its components; None takes 10,000, or as many as there are. Fewer keep the result
            nearer to the corpus: the paper takes 1,000 for pictures that are unlike it.
        start: Adapter of the space at which β begins; None is the mean.
    """

    def __init__(
        self,
        space: str,
        components: int | None = None,
        start: str | None = None,
        name: str = "subspace",
        lr: float | None = None,
        weight_decay: float | None = None,
        span: tuple[float, float] = (0, 1),
    ):
        super().__init__(name, lr, weight_decay, span)
        if components is not None and components < 1:
            raise UsageError(f"SubspaceLoRA needs at least 1 component, not {components}")
        self.space, self.components, self.start = space, components, start
        self.layout: Layout | None = None
        self._peft: dict[str, LoraLayer] = {}

    def attach(self, base: Base, seed: int = 0) -> None:
        """Read the space and inject its layers.

        Raises:
            DataError: There is no such space, it is of another base, or lacks the adapter to start at.
            UsageError: It has fewer components.
        """
        if self.attached:
            return
        from lit_personalize.weights2weights.subspace import Subspace
        from lit_personalize.weights2weights.writing import refuse_base

        space = Subspace.load(Path(self.space))
        refuse_base(space, base)
        k = min(COMPONENTS, len(space)) if self.components is None else self.components
        if k > len(space):
            raise UsageError(f"{self.space} has {len(space)} components, and {k} are asked for: set fewer, or fit more")
        self.layout = space.layout
        # Frozen, large, and on disk already: no checkpoint holds them.
        self.register_buffer("basis", space.components[:k].contiguous(), persistent=False)
        self.register_buffer("deviation", space.deviation, persistent=False)
        self.register_buffer("mean", space.mean, persistent=False)
        base.register(self)
        self.add_factor(BETA, self._start(space, k))
        for component in dict.fromkeys(layer.split(".")[0] for layer in self.layout.layers):
            self._inject(component, base)
        self.attached = True
        self.refresh(base.dtype)

    def _start(self, space: Any, k: int) -> Tensor:
        if self.start is None:
            return torch.zeros(k)
        if self.start not in space.ids:
            raise DataError(f"{self.space} has no adapter {self.start!r} to start at")
        return cast(Tensor, space.coefficients[space.ids.index(self.start), :k])

    def _inject(self, component: str, base: Base) -> None:
        from peft import LoraConfig

        layout = cast("Layout", self.layout)
        module = base.components()[component]
        own = [layer for layer in layout.layers if layer.startswith(f"{component}.")]
        paths = {layer: layer.removeprefix(f"{component}.") for layer in own}
        known = dict(module.named_modules())
        shapes = {s.layer: s.shape for s in layout.slices if s.part == "A"}
        for layer, path in paths.items():
            if path not in known:
                raise DataError(f"{self.space} changes {layer}, which base {base.source} does not have")
        ranks = {path: shapes[layer][0] for layer, path in paths.items()}
        most = max(ranks.values())
        others = {exactly(p for p, r in ranks.items() if r == rank): rank for rank in set(ranks.values()) - {most}}
        config = LoraConfig(r=most, target_modules=exactly(paths.values()), rank_pattern=others)
        inject(config, module, self.name)
        for layer, path in paths.items():
            peft = cast("LoraLayer", module.get_submodule(path))
            peft.scaling[self.name] = layout.alphas[layer] / shapes[layer][0]
            self._peft[layer] = peft
            for linear in (peft.lora_A[self.name], peft.lora_B[self.name]):
                del linear._parameters["weight"]  # the adapter gives them their weights; see refresh

    # ---- factors ----------------------------------------------------------------------------------

    def row(self) -> Tensor:
        """θ `[D]` at the present β, fp32, with its gradient."""
        basis, deviation, mean = (cast(Tensor, getattr(self, name)) for name in ("basis", "deviation", "mean"))
        return (self.factor(BETA) @ basis) * deviation + mean

    def refresh(self, dtype: torch.dtype) -> None:
        parts = cast("Layout", self.layout).views(self.row())
        for layer, peft in self._peft.items():
            # Not registered parameters: the base's state dict stays free of adapters.
            peft.lora_A[self.name].__dict__["weight"] = parts[f"{layer}:A"].to(dtype)
            peft.lora_B[self.name].__dict__["weight"] = parts[f"{layer}:B"].to(dtype)

    def set_active(self, active: bool) -> None:
        if active == self.active:
            return
        self.active = active
        for module in self._peft.values():
            names = [n for n in module.active_adapters if n != self.name]
            module.set_adapter([*names, self.name] if active else names)

    def why_not_in_a_bank(self) -> str:
        return "a bank trains LoRA and TokenEmbedding; invert pictures one by one"

    def layers(self) -> list[str]:
        return list(self._peft)

    def delta(self, layer: str) -> Tensor:
        layout = cast("Layout", self.layout)
        parts = layout.views(self.row())
        return LowRank(parts[f"{layer}:A"], parts[f"{layer}:B"], layout.alphas[layer]).delta()

    @torch.no_grad()
    def export_weights(self) -> AdapterWeights:
        return cast("Layout", self.layout).unflatten(self.row())
