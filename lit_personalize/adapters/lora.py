"""Low-rank adaptation (Hu et al., 2021, arXiv 2106.09685, eq. 3): y = W0 x + s·B·A·x, s = alpha / rank.

Layers and forward are PEFT's. The factors are owned by the adapter in fp32; PEFT's layers
get a view in the base's dtype once a step, so no activation is ever cast.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lit_kernels.bank_lora.layers import fuse
from lit_personalize import randomness
from lit_personalize.adapters import layer_selection
from lit_personalize.adapters.dora import DoraScale
from lit_personalize.adapters.injection import inject
from lit_personalize.adapters.protocol import Adapter, AdapterWeights, Dora, LowRank
from lit_personalize.backbones.base import Base
from lit_personalize.errors import UsageError

TARGETS: dict[str, list[str]] = {
    "attention": ["to_q", "to_k", "to_v", "to_out.0"],
    "key_value": ["attn2.to_k", "attn2.to_v"],
    "query_value": ["to_q", "to_v"],
    "blocks": [
        "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
        "conv1", "conv2", "conv_shortcut",
    ],
}  # fmt: skip
TEXT_TARGETS: dict[str, list[str]] = {
    "attention": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "mlp": ["fc1", "fc2"],
    "blocks": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}


class LoRA(Adapter):
    """LoRA on layers of the UNet and, on request, of the text encoders.

    Layers are named as `layer_selection` says: by a whole name, by its end, or by a regular expression for either.

    Args:
        rank: R, at least 1: A is `[R, in]` and B `[out, R]`, so a layer has R · (in + out) parameters.
        alpha: Scale numerator; None means alpha = rank (of every layer), so s = 1.
        targets: "attention", "key_value" (cross-attention K and V), "query_value", "blocks" (all linear layers and
            convolutions of transformer and residual blocks); layers; or a text file with a layer a line. Layers that
            begin with `text_encoder` are those of text encoders, all others of the UNet.
        text_encoder: Also adapt every text encoder: true or "attention", "mlp", "blocks" (both), layers, or a file.
        init: Of A: "gaussian" = N(0, 1/R²), as diffusers' scripts; "kaiming" = U(±1/√in), PEFT's default.
        in_blocks: Of the UNet's chosen layers only those below one of these: `[up_blocks.0.attentions.1]`.
        rank_pattern: Ranks of single layers; the first pattern that fits a layer counts.
        alpha_pattern: Alphas likewise.
        use_rslora: s = alpha / √R (Kalajdzievski, 2023, arXiv 2312.03732) instead of alpha / R.
        use_dora: Train the length of every output's weights, too (DoRA, see `dora.py`).
        lr_ratio: Learning rate of B over that of A (LoRA+, Hayou et al., 2024, arXiv 2402.12354).
        block_lr: Learning rates of A (and of B, times `lr_ratio`) of single layers, as `rank_pattern` names them.
        init_seed: Of A's initial values; None takes the run's. Adapters whose factors are to be compared number by
            number must have begun at the same ones: of another start, the same change has other factors.
    """

    def __init__(
        self,
        rank: int = 4,
        alpha: float | None = None,
        targets: str | list[str] = "attention",
        text_encoder: bool | str | list[str] = False,
        init: Literal["gaussian", "kaiming"] = "gaussian",
        name: str = "lora",
        lr: float | None = None,
        weight_decay: float | None = None,
        span: tuple[float, float] = (0, 1),
        in_blocks: list[str] | None = None,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        lr_ratio: float | None = None,
        block_lr: dict[str, float] | None = None,
        init_seed: int | None = None,
    ):
        super().__init__(name, lr, weight_decay, span)
        for value in (rank, *(rank_pattern or {}).values()):
            if value < 1:
                raise UsageError(f"LoRA rank must be at least 1, not {value}")
        for label, rates in (("lr_ratio", [lr_ratio]), ("block_lr", (block_lr or {}).values())):
            if wrong := [rate for rate in rates if rate is not None and not 0 <= rate < float("inf")]:
                raise UsageError(f"{label} must not be negative, got {wrong[0]}")
        self.rank = rank
        self.alpha = None if alpha is None else float(alpha)
        self.targets = layer_selection.entries_of(targets, TARGETS, "LoRA targets")
        told = "attention" if text_encoder is True else text_encoder or []
        self.text_targets = layer_selection.entries_of(told, TEXT_TARGETS, "LoRA text_encoder")
        # A set serves several families, and not all have all of its layers; what a user lists must be there.
        self._strict = not (isinstance(targets, str) and targets in TARGETS)
        self._strict_text = not (isinstance(told, str) and told in TEXT_TARGETS)
        self.init = init
        self.in_blocks = in_blocks
        self.rank_pattern = rank_pattern or {}
        self.alpha_pattern = alpha_pattern or {}
        self.use_rslora = use_rslora
        self.use_dora = use_dora
        self.lr_ratio = lr_ratio
        self.block_lr = block_lr or {}
        self.init_seed = init_seed
        self._peft: dict[str, nn.Module] = {}
        self._alphas: dict[str, float] = {}
        """For s = alpha / R: what a pattern or `use_rslora` says is in it."""
        self._dtype: torch.dtype | None = None
        self._fused: frozenset[str] = frozenset()

    def attach(self, base: Base, seed: int = 0) -> None:
        if self.attached:
            return
        components = base.components()
        chosen = self._chosen(layer_selection.changeable(components))
        ranks = layer_selection.per_layer(chosen, self.rank_pattern, "rank_pattern")
        alphas = layer_selection.per_layer(chosen, self.alpha_pattern, "alpha_pattern")
        layer_selection.per_layer(chosen, self.block_lr, "block_lr")
        base.register(self)
        for component, module in components.items():
            own = [layer for layer in chosen if layer.startswith(f"{component}.")]
            if own:
                self._inject(component, module, own, ranks, alphas, seed)
        self.attached = True
        self.refresh(base.dtype)

    def _chosen(self, known: list[str]) -> list[str]:
        """Layers that train, of all that could."""
        unet, text = ([n for n in known if n.startswith("unet.") is side] for side in (True, False))
        entries = [entry for entry in self.targets if not entry.startswith("text_encoder")]
        for_text = [entry for entry in self.targets if entry.startswith("text_encoder")]
        found: list[str] = []
        if entries:
            found = layer_selection.select(unet, entries, "LoRA targets", self._strict)
        if self.in_blocks:
            found = layer_selection.inside(found, self.in_blocks)
        for given, label, strict in (
            (for_text, "LoRA targets", True),
            (self.text_targets, "LoRA text_encoder", self._strict_text),
        ):
            if given:
                found += [n for n in layer_selection.select(text, given, label, strict) if n not in found]
        if not found:
            raise UsageError("LoRA trains no layer: name targets, or set text_encoder: true")
        return found

    def _inject(
        self,
        component: str,
        module: nn.Module,
        layers: list[str],
        ranks: Mapping[str, int],
        alphas: Mapping[str, float],
        seed: int,
    ) -> None:
        from peft import LoraConfig
        from peft.tuners.lora import LoraLayer

        paths = {layer: layer.removeprefix(f"{component}.") for layer in layers}
        r = {layer: ranks.get(layer, self.rank) for layer in layers}
        a = {layer: alphas.get(layer, float(r[layer]) if self.alpha is None else self.alpha) for layer in layers}

        def others(values: Mapping[str, float], usual: float) -> dict[str, Any]:
            different = sorted(set(values.values()) - {usual})
            return {layer_selection.exactly(paths[n] for n in layers if values[n] == v): v for v in different}

        usual = float(self.rank) if self.alpha is None else self.alpha
        config = LoraConfig(
            r=self.rank, lora_alpha=usual, target_modules=layer_selection.exactly(paths.values()),
            rank_pattern=others(r, self.rank), alpha_pattern=others(a, usual),
            use_rslora=self.use_rslora, use_dora=self.use_dora,
        )  # fmt: skip
        inject(config, module, self.name)
        for path, layer in module.named_modules():
            if isinstance(layer, LoraLayer) and self.name in layer.lora_A:
                full = f"{component}.{path}"
                down, up = layer.lora_A[self.name], layer.lora_B[self.name]
                self.add_factor(f"{full}:A", self._initial_down(down.weight.shape, seed, full))
                self.add_factor(f"{full}:B", torch.zeros(up.weight.shape))
                for linear in (down, up):  # the adapter owns the factors; see refresh
                    del linear._parameters["weight"]
                self._peft[full] = layer
                self._alphas[full] = a[full] * (r[full] ** 0.5 if self.use_rslora else 1.0)
                if self.use_dora:
                    scale = DoraScale(layer.get_base_layer())
                    scale.own(self.add_factor(f"{full}:m", scale.frozen().norm(dim=1)))
                    layer.lora_magnitude_vector[self.name] = scale

    def _initial_down(self, shape: torch.Size, seed: int, layer: str) -> Tensor:
        seed = seed if self.init_seed is None else self.init_seed
        if self.init == "gaussian":
            return randomness.normal(shape, seed, "lora-init", 0, [layer])[0] / shape[0]
        draws = randomness.generator(seed, "lora-init", 0, layer).random(tuple(shape), dtype="float32")
        return (2 * torch.from_numpy(draws) - 1) / shape[1:].numel() ** 0.5

    def why_not_in_a_bank(self) -> str:
        if self.use_dora:
            return "it has use_dora"
        for layer, module in self._peft.items():
            if not isinstance(module.get_base_layer(), nn.Linear):  # type: ignore[operator]
                return f"{layer} is a convolution; set targets to linear layers, such as attention"
        return ""

    @torch.no_grad()
    def begin(self, seed: int, class_noun: str = "") -> None:
        for layer in self._peft:
            down = self.factor(f"{layer}:A")
            down.copy_(self._initial_down(down.shape, seed, layer))
            self.factor(f"{layer}:B").zero_()

    def lend(self, stacked: Mapping[str, Tensor] | None) -> None:
        for layer, module in self._peft.items():
            if "_lit_backend" not in module.__dict__:  # else the UNet is patched, with a backend of its own
                fuse(module, "fallback")
            for part, linear in (("A", module.lora_A[self.name]), ("B", module.lora_B[self.name])):  # type: ignore[operator,index]
                name = f"{layer}:{part}"
                linear.__dict__["weight"] = self.factor(name) if stacked is None else stacked[name]
        self._dtype = None  # what `refresh` had cast is gone

    def refresh(self, dtype: torch.dtype) -> None:
        for layer, scale in self._scales().items():  # the norms are those of the coming step
            factors = self._factors(layer)
            scale.refresh(factors.down, factors.up, factors.alpha / factors.rank)
        if dtype == torch.float32 and self._dtype == dtype and self.steady:
            return  # the layers already hold the factors themselves
        for layer, module in self._peft.items():
            for part, linear in (("A", module.lora_A[self.name]), ("B", module.lora_B[self.name])):  # type: ignore[operator,index]
                factor = self.factor(f"{layer}:{part}")
                own = dtype == torch.float32 or layer in self._fused
                # Not a registered parameter: the base's state dict stays free of adapters.
                linear.__dict__["weight"] = factor if own else factor.to(dtype)
        self._dtype = dtype

    def place(self) -> dict[str, nn.Parameter]:
        """Nothing moves: the factors are small."""
        return super().place() if self.use_dora else {}

    def leave_rounding_to(self, fused: Collection[str]) -> None:
        """Fused layers take the factors themselves: no cast is launched, and gradients come back in fp32."""
        self._fused = frozenset(fused)
        self._dtype = None

    def set_active(self, active: bool) -> None:
        if active == self.active:
            return
        self.active = active
        for module in self._peft.values():
            names = [n for n in module.active_adapters if n != self.name]  # type: ignore[union-attr]
            module.set_adapter([*names, self.name] if active else names)  # type: ignore[operator]

    def layers(self) -> list[str]:
        return list(self._peft)

    @property
    def shares_layers(self) -> bool:
        """Not with magnitudes: they are those of the weights that this adapter knows."""
        return not self.use_dora

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group; with `block_lr` one more for each of its entries, and with `lr_ratio` each again for B.

        Names: `<name>`, `<name>:B`, `<name>/<entry>`, `<name>/<entry>:B`. Magnitudes are with A.
        """
        if self.lr_ratio is None and not self.block_lr:
            return super().parameter_groups()
        of_layer = {e: self._named(e) for e in reversed(self.block_lr)}
        entry_of = {layer: entry for entry, layers in of_layer.items() for layer in layers}  # the first one wins
        members: dict[tuple[str | None, bool], list[nn.Parameter]] = {}
        for name, factor in self.named_factors().items():
            layer, _, part = name.rpartition(":")
            apart = part == "B" and self.lr_ratio is not None
            members.setdefault((entry_of.get(layer), apart), []).append(factor)
        groups = []
        for entry in (None, *self.block_lr):
            label = self.name if entry is None else f"{self.name}/{entry}"
            own = {} if entry is None else {"lr": self.block_lr[entry]}
            if (entry, False) in members:
                groups.append(self._group(label, members[entry, False], **own))
            if (entry, True) in members:
                groups.append(self._group(f"{label}:B", members[entry, True], lr_ratio=self.lr_ratio, **own))
        return groups

    def _named(self, entry: str) -> list[str]:
        return layer_selection.fitting(self._peft, entry)

    def _scales(self) -> dict[str, DoraScale]:
        if not self.use_dora:
            return {}
        return {n: cast(DoraScale, m.lora_magnitude_vector[self.name]) for n, m in self._peft.items()}  # type: ignore[index]

    def _factors(self, layer: str) -> LowRank:
        return LowRank(self.factor(f"{layer}:A"), self.factor(f"{layer}:B"), self._alphas[layer])

    def delta(self, layer: str) -> Tensor:
        if self.use_dora:
            return Dora(self._factors(layer), self.factor(f"{layer}:m")).delta(self._scales()[layer].frozen())
        return self._factors(layer).delta()

    def export_weights(self) -> AdapterWeights:
        """Detached copies; of DoRA the true ΔW of every layer, and what it is made of."""

        def copy(value: Tensor) -> Tensor:
            return value.detach().float().cpu().clone()

        own = {layer: self._factors(layer) for layer in self.layers()}
        low_rank = {layer: LowRank(copy(f.down), copy(f.up), f.alpha) for layer, f in own.items()}
        if not self.use_dora:
            return AdapterWeights(low_rank=low_rank)
        return AdapterWeights(
            dense={layer: copy(self.delta(layer)) for layer in own},
            dora={layer: Dora(f, copy(self.factor(f"{layer}:m"))) for layer, f in low_rank.items()},
        )
