"""What operators are measured against: the same results and gradients, as others compute them, of a case's own inputs.

* "peft autocast": PEFT's layers with fp32 factors beside a frozen model in bf16, under autocast: what diffusers'
  training scripts do. "peft casts off": factors in the model's dtype and no autocast, so that nothing is cast.
  A bank is a loop over one such layer for each adapter.
* "compiled": `torch.compile` of the plain formula. "graph": the formula in a CUDA graph, without launches to wait for;
  on a CPU, where there are none, as it is.
* "SDPA flash", "SDPA cudnn", "SDPA efficient", "SDPA math": each of torch's fused attentions, where it runs.
* "diffusers": its GEGLU module behind the projection.
* "AdamW": an optimizer for each adapter, fused, and clipping; each adapter is a single tensor, the fewest launches.

The plain formula of `absorbed_attention` is the ordinary layer: projection, torch's attention, projection.

Everything runs on a CPU too, where a test compares results and gradients with ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_kernels.attention.reference import attention
from lit_kernels.bank_adamw import fallback as adamw
from lit_kernels.bank_lora import reference as bank_lora
from lit_kernels.frozen_geglu import reference as frozen_geglu
from lit_kernels.short_key_attention import fallback as short_keys
from lit_kernels.short_key_attention.reference import by_heads
from lit_kernels.text_kv import reference as text_kv

Given = Mapping[str, Any]
"""Inputs of a case by name, as `lit_kernels.measuring` draws them."""


@dataclass
class Baseline:
    """One way to compute a case."""

    run: Callable[[], Any]
    """Returns what the operator returns; for `bank_adamw` the new weights of each adapter."""
    learning: list[Tensor]
    """Tensors whose gradients are those of the case's own, in the same order; a stack may be several."""
    graphed: bool = False
    """Measured as CUDA graphs of both passes."""


def baselines_of(operator: str, given: Given, compiler: str = "inductor") -> dict[str, Callable[[], Baseline]]:
    """Baselines of an operator by name, not built yet: building or running one may fail where it cannot run.

    Args:
        compiler: Of `torch.compile`.
    """

    def compiled() -> Baseline:
        torch.compiler.reset()  # a function that was compiled for many sizes is compiled no more, without a word
        plain, learning = _PLAIN[operator](given)
        return Baseline(torch.compile(plain, fullgraph=True, dynamic=False, backend=compiler), learning)

    return {
        **_OTHERS[operator](given),
        "compiled": compiled,
        "graph": lambda: Baseline(*_PLAIN[operator](given), graphed=True),
    }


def plain_of(operator: str, given: Given) -> Callable[[], Any]:
    """The plain formula of an operator."""
    return _PLAIN[operator](given)[0]


def peft_layers(
    weights: Sequence[Tensor], downs: Sequence[Tensor], ups: Sequence[Tensor], scale: float, dtype: torch.dtype
) -> list[Any]:
    """PEFT's LoRA layers around frozen linear ones, with these factors in `dtype`."""
    from peft import LoraConfig, inject_adapter_in_model

    with torch.device("meta"):
        linears = [nn.Linear(weight.shape[1], len(weight), bias=False) for weight in weights]
    for linear, weight in zip(linears, weights, strict=True):
        linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    rank = len(downs[0])
    config = LoraConfig(r=rank, lora_alpha=rank * scale, target_modules=r"\d+")
    model: Any = inject_adapter_in_model(config, nn.ModuleList(linears))
    for layer, down, up in zip(model, downs, ups, strict=True):
        layer.lora_A["default"].weight = nn.Parameter(down.detach().to(dtype))
        layer.lora_B["default"].weight = nn.Parameter(up.detach().to(dtype))
    return list(model)


def _factors(layers: Sequence[Any]) -> list[Tensor]:
    """All A, then all B."""
    return [getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B") for layer in layers]


def _as_scripts_do(x: Tensor) -> torch.autocast:
    """Autocast to bf16 beside a model in bf16; none for an fp32 or fp64 one, which is for tests."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16)


def _text_kv(given: Given) -> dict[str, Callable[[], Baseline]]:
    text, arguments = given["text"], (given["weights"], given["downs"], given["ups"], given["scale"])

    def autocast() -> Baseline:
        layers = peft_layers(*arguments, torch.promote_types(text.dtype, torch.float32))

        def run() -> list[Tensor]:
            with _as_scripts_do(text):
                return [layer(text) for layer in layers]

        return Baseline(run, _factors(layers))

    def casts_off() -> Baseline:
        layers = peft_layers(*arguments, text.dtype)
        return Baseline(lambda: [layer(text) for layer in layers], _factors(layers))

    return {"peft autocast": autocast, "peft casts off": casts_off}


def _plain_text_kv(given: Given) -> tuple[Callable[[], Any], list[Tensor]]:
    text, downs, ups = given["text"], list(given["downs"]), list(given["ups"])

    def run() -> list[Tensor]:
        low_downs, low_ups = ([factor.to(text.dtype) for factor in factors] for factors in (downs, ups))
        return text_kv.text_key_values(text, given["weights"], low_downs, low_ups, given["scales"])

    return run, downs + ups


def _bank_lora(given: Given) -> dict[str, Callable[[], Baseline]]:
    x, adapters = given["x"], len(given["downs"])
    arguments = ([given["weight"]] * adapters, given["downs"], given["ups"], given["scale"])

    def loop(layers: Sequence[Any]) -> Tensor:
        if adapters == 1:
            return layers[0](x)  # type: ignore[no-any-return]
        return torch.cat([layer(own) for layer, own in zip(layers, x.chunk(adapters), strict=True)])

    def autocast() -> Baseline:
        layers = peft_layers(*arguments, torch.promote_types(x.dtype, torch.float32))

        def run() -> Tensor:
            with _as_scripts_do(x):
                return loop(layers)

        return Baseline(run, [x, *_factors(layers)])

    def casts_off() -> Baseline:
        layers = peft_layers(*arguments, x.dtype)
        return Baseline(lambda: loop(layers), [x, *_factors(layers)])

    return {"peft autocast": autocast, "peft casts off": casts_off}


def _plain_bank_lora(given: Given) -> tuple[Callable[[], Any], list[Tensor]]:
    x, downs, ups = given["x"], given["downs"], given["ups"]

    def run() -> Tensor:
        low_downs, low_ups = downs.to(x.dtype), ups.to(x.dtype)
        y = bank_lora.bank_lora(x.flatten(0, 1), given["weight"], low_downs, low_ups, given["scales"])
        return y.unflatten(0, x.shape[:2])

    return run, [x, downs, ups]


def _short_keys(given: Given) -> dict[str, Callable[[], Baseline]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query, key, value = tensors = [given["query"], given["key"], given["value"]]

    def by(backend: SDPBackend) -> Baseline:
        def run() -> Tensor:
            with sdpa_kernel([backend]):
                return short_keys.short_key_attention(query, key, value, given["heads"])

        return Baseline(run, tensors)

    named = {
        "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
    }  # fmt: skip
    return {f"SDPA {name}": functools.partial(by, backend) for name, backend in named.items()}


def _plain_short_keys(given: Given) -> tuple[Callable[[], Any], list[Tensor]]:
    tensors = [given["query"], given["key"], given["value"]]

    def run() -> Tensor:
        return attention(*(by_heads(x, given["heads"]) for x in tensors)).transpose(1, 2).flatten(2)

    return run, tensors


def _frozen_geglu(given: Given) -> dict[str, Callable[[], Baseline]]:
    def diffusers() -> Baseline:
        from diffusers.models.activations import GEGLU

        gate: Any = GEGLU(1, 1)
        gate.proj = nn.Identity()  # of the module only what comes after its projection
        return Baseline(lambda: gate(given["projected"]), [given["projected"]])

    return {"diffusers": diffusers}


def _plain_frozen_geglu(given: Given) -> tuple[Callable[[], Any], list[Tensor]]:
    return lambda: frozen_geglu.frozen_geglu(given["projected"]), [given["projected"]]


def _plain_absorbed(given: Given) -> tuple[Callable[[], Any], list[Tensor]]:
    def run() -> Tensor:
        query, keys, values = given["x"] @ given["query_weight"].T, given["key"], given["value"]
        query, keys, values = (by_heads(states, given["heads"]) for states in (query, keys, values))
        out = F.scaled_dot_product_attention(query, keys, values)
        return out.transpose(1, 2).flatten(2) @ given["out_weight"].T

    return run, []


def _adamw(given: Given) -> dict[str, Callable[[], Baseline]]:
    def separate() -> Baseline:
        weights = [nn.Parameter(weight) for weight in given["weight"].clone()]
        shadow, norm = torch.empty_like(given["shadow"]), given["norm"]
        for weight, grad in zip(weights, given["grad"].clone(), strict=True):
            weight.grad = grad
        options = {"lr": given["lr"], "weight_decay": given["decay"], "fused": True}
        optimizers = [torch.optim.AdamW([weight], **options) for weight in weights]

        def run() -> list[Tensor]:
            for weight, optimizer, copy in zip(weights, optimizers, shadow, strict=True):
                nn.utils.clip_grad_norm_([weight], norm)
                optimizer.step()
                copy.copy_(weight.detach())
            return [weight.detach() for weight in weights]

        return Baseline(run, [])

    return {"AdamW": separate}


def _plain_adamw(given: Given) -> tuple[Callable[[], Any], list[Tensor]]:
    weight, first, second = (given[name].clone() for name in ("weight", "first", "second"))
    step, shadow = given["step"].clone(), given["shadow"].clone()
    lr, decay, norm = (torch.full_like(weight[:, 0], given[name]) for name in ("lr", "decay", "norm"))

    def run() -> list[Tensor]:
        adamw.bank_adamw(weight, first, second, given["grad"], lr, decay, step, norm, (0.9, 0.999), 1e-8, shadow)
        return list(weight)

    return run, []


_OTHERS = {
    "text_kv": _text_kv, "short_key_attention": _short_keys, "bank_lora": _bank_lora, "frozen_geglu": _frozen_geglu,
    "absorbed_attention": lambda _: {}, "bank_adamw": _adamw,
}  # fmt: skip
_PLAIN = {
    "text_kv": _plain_text_kv, "short_key_attention": _plain_short_keys, "bank_lora": _plain_bank_lora,
    "frozen_geglu": _plain_frozen_geglu, "absorbed_attention": _plain_absorbed, "bank_adamw": _plain_adamw,
}  # fmt: skip
