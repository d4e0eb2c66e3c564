"""Two low-rank adapters whose columns are weighed against each other (ZipLoRA, Shah et al., 2023, arXiv 2311.13600).

    ΔW = ΔW_c diag(m_c) + ΔW_s diag(m_s)                                       (sec. 4.2)

Column j of a change is scaled by m_j, which acts on the input: B A diag(m) = B (A diag(m)). So the mergers scale the
thin A, dense changes are never formed, and the result is a LoRA of rank r_c + r_s.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from lit_personalize.adapters.injection import inject
from lit_personalize.adapters.loaded import LoadedAdapter
from lit_personalize.adapters.protocol import Adapter, AdapterWeights, LowRank
from lit_personalize.backbones.base import Base
from lit_personalize.errors import UsageError

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

Part = Literal["content", "style"]
PARTS: tuple[Part, Part] = ("content", "style")
Similarity = Literal["dot", "elementwise"]


class ZipLoRA(Adapter):
    """Merger coefficients of two frozen LoRAs; they start at 1, the plain sum.

    Args:
        content: File or folder of the subject's LoRA, made for the same base.
        style: Likewise of the style's.
    """

    def __init__(
        self,
        content: str,
        style: str,
        name: str = "ziplora",
        lr: float | None = None,
        weight_decay: float | None = None,
    ):
        super().__init__(name, lr, weight_decay)
        self.files: dict[Part, str] = {"content": content, "style": style}
        self.showing: Part | None = None
        """Which LoRA is applied alone, as it was trained; None is the merged one."""
        self._frozen: dict[str, dict[Part, LowRank]] = {}
        self._peft: dict[str, LoraLayer] = {}
        self._tokens: dict[str, list[Tensor]] = {}
        self._dtype = torch.float32

    def attach(self, base: Base, seed: int = 0) -> None:
        """Read both files and inject their factors.

        Raises:
            DataError: A file cannot be read, or is of another base.
            UsageError: A file changes weights that are not low-rank, or both call their token alike.
        """
        if self.attached:
            return
        parts = {part: self._read(part, base) for part in PARTS}
        base.register(self)
        if self._tokens:
            LoadedAdapter(AdapterWeights(tokens=self._tokens), f"words of {self.name}").attach(base)
        for component, module in base.components().items():
            self._inject(component, module, parts)
        self.attached = True
        self.refresh(base.dtype)

    def _read(self, part: Part, base: Base) -> dict[str, LowRank]:
        from lit_personalize.export.loading import read_adapter

        weights = read_adapter(Path(self.files[part]), base)
        if weights.dense or not weights.low_rank:
            raise UsageError(f"{self.files[part]} is no LoRA: ZipLoRA merges low-rank changes; export it as one first")
        if both := set(weights.tokens) & set(self._tokens):
            raise UsageError(f"{' and '.join(self.files.values())} both call their token {both.pop()}: learn one anew")
        self._tokens |= weights.tokens
        return weights.low_rank

    def _inject(self, component: str, module: nn.Module, parts: dict[Part, dict[str, LowRank]]) -> None:
        from peft import LoraConfig

        paths = [path for path, _ in module.named_modules()]
        named = [(path, f"{component}.{path}") for path in paths]
        found = {path: {part: own[layer] for part, own in parts.items() if layer in own} for path, layer in named}
        found = {path: own for path, own in found.items() if own}
        if not found:
            return
        ranks = {path: sum(factors.rank for factors in own.values()) for path, own in found.items()}
        # Anchored, since PEFT's lists and patterns match endings.
        target = "|".join(path.replace(".", r"\.") for path in found)
        config = LoraConfig(r=1, target_modules=f"(?:{target})", rank_pattern={f"^{p}$": r for p, r in ranks.items()})
        inject(config, module, self.name)
        for path, own in found.items():
            layer, peft = f"{component}.{path}", cast("LoraLayer", module.get_submodule(path))
            self._frozen[layer], self._peft[layer] = own, peft
            peft.scaling[self.name] = 1.0
            for part, factors in own.items():
                self.add_factor(f"{layer}:{part}", torch.ones(factors.down.shape[1:]))
            for linear in (peft.lora_A[self.name], peft.lora_B[self.name]):
                del linear._parameters["weight"]  # the adapter gives them their weights; see refresh

    # ---- factors ----------------------------------------------------------------------------------

    def _down(self, layer: str) -> Tensor:
        """A `[r_c + r_s, in]` with the mergers in it, or with one LoRA's rows as they were and the other's zero."""
        rows = []
        for part, factors in self._frozen[layer].items():
            merger = self.factor(f"{layer}:{part}")
            down = factors.down.to(merger.device)
            rows.append(down * merger if self.showing is None else down * float(part == self.showing))
        return torch.cat(rows)

    def _up(self, layer: str) -> Tensor:
        """B `[out, r_c + r_s]`, scales included."""
        ups = [f.up * (f.alpha / f.rank) for f in self._frozen[layer].values()]
        return torch.cat(ups, dim=1).to(self.factors[next(iter(self.factors))].device)

    def refresh(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        for layer, peft in self._peft.items():
            # Not registered parameters: the base's state dict stays free of adapters.
            peft.lora_A[self.name].__dict__["weight"] = self._down(layer).to(dtype)
            peft.lora_B[self.name].__dict__["weight"] = self._up(layer).to(dtype)

    def show(self, part: Part | None) -> None:
        """Apply one LoRA alone, as it was trained, or (None) the merged one."""
        if part != self.showing:
            self.showing = part
            self.refresh(self._dtype)

    def similarity(self, kind: Similarity) -> Tensor:
        """How much the two LoRAs use the same columns, over layers that both change; a scalar.

        "dot" is Σ_layers |m_c · m_s| (eq. 3); "elementwise" Σ_layers mean_j |m_cj m_sj|, as in a common port, which is
        far smaller but never cancels by signs.
        """
        total = torch.zeros((), device=next(iter(self.factors.values())).device)
        for layer, own in self._frozen.items():
            if len(own) == len(PARTS):
                product = self.factor(f"{layer}:content") * self.factor(f"{layer}:style")
                total = total + (product.sum().abs() if kind == "dot" else product.abs().mean())
        return total

    # ---- protocol ---------------------------------------------------------------------------------

    def set_active(self, active: bool) -> None:
        if active == self.active:
            return
        self.active = active
        for module in self._peft.values():
            names = [n for n in module.active_adapters if n != self.name]
            module.set_adapter([*names, self.name] if active else names)

    def layers(self) -> list[str]:
        return list(self._peft)

    def delta(self, layer: str) -> Tensor:
        return self._up(layer).flatten(1) @ self._down(layer).flatten(1)

    @torch.no_grad()
    def export_weights(self) -> AdapterWeights:
        low_rank = {}
        for layer in self.layers():
            down, up = self._down(layer).cpu().contiguous(), self._up(layer).cpu().contiguous()
            low_rank[layer] = LowRank(down, up, float(len(down)))
        return AdapterWeights(low_rank=low_rank, tokens=self._tokens)
