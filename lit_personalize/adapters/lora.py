"""Low-rank adaptation (Hu et al., 2021, arXiv 2106.09685, eq. 3): y = W0 x + s·B·A·x, s = alpha / rank.

Layers, targets and forward are PEFT's. The factors are owned by the adapter in fp32; PEFT's layers
get a view in the base's dtype once a step, so no activation is ever cast.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lit_personalize import randomness
from lit_personalize.adapters.protocol import Adapter, AdapterWeights, LowRank
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
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


class LoRA(Adapter):
    """LoRA on layers of the UNet and, on request, of the text encoders.

    Args:
        rank: R, at least 1: A is `[R, in]` and B `[out, R]`, so a layer has R · (in + out) parameters.
        alpha: Scale numerator; None means alpha = rank, so s = 1.
        targets: "attention", "key_value" (cross-attention K and V), "query_value", "blocks" (all linear layers and
            convolutions of transformer and residual blocks), or name endings.
        text_encoder: Also adapt the attention of every text encoder.
        init: Of A: "gaussian" = N(0, 1/R²), as diffusers' scripts; "kaiming" = U(±1/√in), PEFT's default.
    """

    def __init__(
        self,
        rank: int = 4,
        alpha: float | None = None,
        targets: str | list[str] = "attention",
        text_encoder: bool = False,
        init: Literal["gaussian", "kaiming"] = "gaussian",
        name: str = "lora",
        lr: float | None = None,
        weight_decay: float | None = None,
        span: tuple[float, float] = (0, 1),
    ):
        super().__init__(name, lr, weight_decay, span)
        if rank < 1:
            raise UsageError(f"LoRA rank must be at least 1, not {rank}")
        if isinstance(targets, str) and targets not in TARGETS:
            raise UsageError(f"unknown LoRA targets {targets!r}; use one of {', '.join(TARGETS)} or a list of names")
        self.rank = rank
        self.alpha = float(rank if alpha is None else alpha)
        self.targets = TARGETS[targets] if isinstance(targets, str) else list(targets)
        self.text_encoder = text_encoder
        self.init = init
        self._peft: dict[str, nn.Module] = {}
        self._dtype: torch.dtype | None = None

    def attach(self, base: Base, seed: int = 0) -> None:
        if self.attached:
            return
        base.register(self)
        components = base.components()
        self._inject("unet", components["unet"], self.targets, seed)
        if self.text_encoder:
            for component in (c for c in components if c.startswith("text_encoder")):
                self._inject(component, components[component], TEXT_TARGETS, seed)
        self.attached = True
        self.refresh(base.dtype)

    def _inject(self, component: str, module: nn.Module, targets: list[str], seed: int) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=targets)
        try:
            with torch.random.fork_rng(devices=[]):  # PEFT initialises from the global generator; overwritten below
                inject_adapter_in_model(config, module, adapter_name=self.name)
        except ValueError as error:
            raise UsageError(f"LoRA targets {targets} match no layer of {component}: {error}") from error
        for path, layer in module.named_modules():
            if isinstance(layer, LoraLayer) and self.name in layer.lora_A:
                full = f"{component}.{path}"
                down, up = layer.lora_A[self.name], layer.lora_B[self.name]
                self.add_factor(f"{full}:A", self._initial_down(down.weight.shape, seed, full))
                self.add_factor(f"{full}:B", torch.zeros(up.weight.shape))
                for linear in (down, up):  # the adapter owns the factors; see refresh
                    del linear._parameters["weight"]
                self._peft[full] = layer

    def _initial_down(self, shape: torch.Size, seed: int, layer: str) -> Tensor:
        if self.init == "gaussian":
            return randomness.normal(shape, seed, "lora-init", 0, [layer])[0] / self.rank
        draws = randomness.generator(seed, "lora-init", 0, layer).random(tuple(shape), dtype="float32")
        return (2 * torch.from_numpy(draws) - 1) / shape[1:].numel() ** 0.5

    def refresh(self, dtype: torch.dtype) -> None:
        if dtype == torch.float32 and self._dtype == dtype:
            return  # the layers already hold the factors themselves
        for layer, module in self._peft.items():
            for part, linear in (("A", module.lora_A[self.name]), ("B", module.lora_B[self.name])):  # type: ignore[operator,index]
                factor = self.factor(f"{layer}:{part}")
                # Not a registered parameter: the base's state dict stays free of adapters.
                linear.__dict__["weight"] = factor if dtype == torch.float32 else factor.to(dtype)
        self._dtype = dtype

    def set_active(self, active: bool) -> None:
        if active == self.active:
            return
        self.active = active
        for module in self._peft.values():
            names = [n for n in module.active_adapters if n != self.name]  # type: ignore[union-attr]
            module.set_adapter([*names, self.name] if active else names)  # type: ignore[operator]

    def layers(self) -> list[str]:
        return list(self._peft)

    def delta(self, layer: str) -> Tensor:
        up, down = self.factor(f"{layer}:B"), self.factor(f"{layer}:A")
        return (self.alpha / self.rank) * (up.flatten(1) @ down.flatten(1))

    def export_weights(self) -> AdapterWeights:
        def copy(name: str) -> Tensor:
            return self.factor(name).detach().float().cpu().clone()

        low_rank = {layer: LowRank(copy(f"{layer}:A"), copy(f"{layer}:B"), self.alpha) for layer in self.layers()}
        return AdapterWeights(low_rank=low_rank)
