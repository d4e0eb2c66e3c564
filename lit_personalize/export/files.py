"""Write adapter files: diffusers LoRA, PEFT folders, kohya LoRA, learned embeddings, dense deltas. safetensors only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from lit_personalize import __version__, atomic
from lit_personalize.adapters.protocol import LowRank
from lit_personalize.export import keys

FORMAT_VERSION = "1"


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write whole or not at all; every file names its format version."""
    stamped = {"format": "pt", "litp.version": __version__, "litp.format_version": FORMAT_VERSION, **metadata}
    atomic.write_bytes(path, save({k: t.contiguous() for k, t in tensors.items()}, metadata=stamped))
    return path


def diffusers_lora(low_rank: Mapping[str, LowRank]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Keys of `load_lora_weights` and PEFT, with alpha folded into B.

    Clients that do not read the metadata assume alpha = rank: so that is what the file says, and
    s = alpha / rank is multiplied into `lora_B`.
    """
    tensors: dict[str, Tensor] = {}
    described: dict[str, object] = {}
    for component in dict.fromkeys(keys.split(layer)[0] for layer in low_rank):
        own = {layer: f for layer, f in low_rank.items() if keys.split(layer)[0] == component}
        # Without `text_model.`: as an ending it fits flattened and nested text encoders alike.
        ranks = {keys.split(layer)[1].removeprefix("text_model."): f.rank for layer, f in own.items()}
        most = max(set(ranks.values()), key=list(ranks.values()).count)
        others = {path: rank for path, rank in ranks.items() if rank != most}
        described |= {
            f"{component}.peft_type": "LORA", f"{component}.r": most, f"{component}.lora_alpha": most,
            f"{component}.rank_pattern": others, f"{component}.alpha_pattern": others,
            f"{component}.target_modules": sorted(ranks), f"{component}.lora_dropout": 0.0,
            f"{component}.bias": "none", f"{component}.use_rslora": False, f"{component}.use_dora": False,
        }  # fmt: skip
        for layer, factors in own.items():
            name = keys.portable(layer)
            tensors[f"{name}.lora_A.weight"] = factors.down
            tensors[f"{name}.lora_B.weight"] = factors.up * (factors.alpha / factors.rank)
    return tensors, {"lora_adapter_metadata": json.dumps(described, sort_keys=True)}


def kohya_lora(low_rank: Mapping[str, LowRank], two_encoders: bool) -> dict[str, Tensor]:
    """kohya's keys with the adapter's alpha as a scalar tensor.

    One alpha for the whole file, the commonest: diffusers loses the others (its pattern of alphas
    matches no layer). A layer that was trained with another one has the ratio multiplied into `up`.
    """
    tensors: dict[str, Tensor] = {}
    alphas = [factors.alpha for factors in low_rank.values()]
    alpha = max(dict.fromkeys(alphas), key=alphas.count)
    for layer, factors in low_rank.items():
        name = keys.kohya(layer, two_encoders)
        tensors[f"{name}.lora_down.weight"] = factors.down
        tensors[f"{name}.lora_up.weight"] = factors.up * (factors.alpha / alpha)
        tensors[f"{name}.alpha"] = factors.down.new_tensor(alpha)
    return tensors


def learned_embeds(token: str, rows: list[Tensor]) -> dict[str, Tensor]:
    """`{token: [n, d]}` for one text encoder, `{clip_l, clip_g}` for SDXL's two."""
    if len(rows) == 2:
        return {"clip_l": rows[0], "clip_g": rows[1]}
    return {token: rows[0]}


def peft_lora(
    low_rank: Mapping[str, LowRank], component: str, magnitudes: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """One component's factors in the keys of `PeftModel`, and its `adapter_config.json` with the true alphas.

    Args:
        magnitudes: DoRA's m `[out]` of every layer, or nothing.

    Module paths are those of the loaded module: PEFT wraps it and knows no other spelling.
    """
    from peft import LoraConfig

    own = {keys.split(layer)[1]: f for layer, f in low_rank.items() if keys.split(layer)[0] == component}
    ranks, alphas = ({path: v(f) for path, f in own.items()} for v in (lambda f: f.rank, lambda f: f.alpha))
    most = {name: max(set(v.values()), key=list(v.values()).count) for name, v in (("r", ranks), ("alpha", alphas))}
    config = LoraConfig(
        r=most["r"], lora_alpha=most["alpha"], target_modules=sorted(own), inference_mode=True,
        use_dora=bool(magnitudes),
        rank_pattern={p: r for p, r in ranks.items() if r != most["r"]},
        alpha_pattern={p: a for p, a in alphas.items() if a != most["alpha"]},
    )  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for path, factors in own.items():
        tensors[f"{keys.PEFT_ROOT}{path}.lora_A.weight"] = factors.down
        tensors[f"{keys.PEFT_ROOT}{path}.lora_B.weight"] = factors.up
        if magnitudes:
            shape = (-1,) if factors.down.ndim == 2 else (1, -1, *[1] * (factors.down.ndim - 2))
            tensors[f"{keys.PEFT_ROOT}{path}.{keys.MAGNITUDE}"] = magnitudes[f"{component}.{path}"].reshape(shape)
    described = config.to_dict()
    return tensors, {k: sorted(v) if isinstance(v, set) else v for k, v in described.items()}


def write_peft(
    folder: Path,
    low_rank: Mapping[str, LowRank],
    component: str,
    metadata: Mapping[str, str],
    magnitudes: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `adapter_model.safetensors` and `adapter_config.json`, which `PeftModel.from_pretrained` reads."""
    tensors, config = peft_lora(low_rank, component, magnitudes or {})
    write_safetensors(folder / "adapter_model.safetensors", tensors, {**metadata, "litp.component": component})
    atomic.write_text(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")
    return folder


def dense_deltas(changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`{<portable name>.delta: change}` of layers `[out, in]` and of other parameters; for our own reader alone."""
    return {f"{keys.portable(name)}.delta": change for name, change in changes.items()}
