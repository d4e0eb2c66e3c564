"""Look into an adapter file without loading a base."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_personalize.errors import DataError
from lit_personalize.export import keys
from lit_personalize.export.loading import LORA, read_file, settings_of, stated_alpha
from lit_personalize.export.neurons import INDEX, VALUE
from lit_personalize.export.rotations import MARK

FORMATS = {
    "kohya": "kohya LoRA", "diffusers": "diffusers LoRA", "peft": "PEFT LoRA", "oft": "PEFT OFT",
    "neurons": "concept neurons",
    "delta": "dense delta", "embedding": "embedding",
}  # fmt: skip


def kind_of(tensors: Iterable[str]) -> str:
    """Kind of a file by its keys: kohya, diffusers, peft, oft, delta, neurons or embedding."""
    names = list(tensors)
    if any(MARK in n for n in names):
        return "oft"
    if all(n.endswith((INDEX, VALUE)) for n in names):
        return "neurons"
    if any(n.startswith("lora_") for n in names):
        return "kohya"
    if any(n.startswith(keys.PEFT_ROOT) for n in names):
        return "peft"
    if any("lora" in n for n in names):
        return "diffusers"
    return "delta" if all(n.endswith(".delta") for n in names) else "embedding"


def inspect_file(path: Path) -> dict[str, Any]:
    """Format, layers, ranks, alphas, tokens, metadata and size of one file or PEFT folder.

    Raises:
        DataError: Missing, a pickle, damaged, or of a newer format.
    """
    if path.is_dir():
        inner = path / "adapter_model.safetensors"
        if not inner.is_file():
            raise DataError(f"{path} is a folder without adapter_model.safetensors; name one adapter file")
        path = inner
    tensors, metadata = read_file(path)
    kind = kind_of(tensors)
    matches = {k: m for k in tensors if (m := LORA.match(k))}
    layers = [name for name in tensors if not name.endswith(VALUE)]
    downs = {m["layer"]: tensors[k] for k, m in matches.items() if "down" in (m["ud"], m["k"]) or m["ab"] == "A"}
    return {
        "file": str(path),
        "format": FORMATS[kind] + (" with DoRA" if any(keys.is_magnitude(n) for n in tensors) else ""),
        "bytes": path.stat().st_size,
        "tensors": len(tensors),
        "parameters": sum(t.numel() for t in tensors.values()),
        "layers": len(downs) or len(layers),
        "components": _components(downs or layers, kind, metadata),
        "ranks": _counts(t.shape[0] for t in downs.values()),
        "alphas": _counts(_alphas(tensors, downs, metadata, path)) or "as rank",
        "largest_error": metadata.get("litp.largest_error", "unknown"),
        "kept": metadata.get("litp.kept", "unknown"),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}),
        "tokens": _tokens(tensors, kind, metadata),
        "base": metadata.get("litp.base", metadata.get("ss_sd_model_name", "unknown")),
        "base_fingerprint": metadata.get("litp.base_fingerprint", "unknown"),
        "architecture": metadata.get("modelspec.architecture", "unknown"),
        "details": metadata.get("litp.details", ""),
        "keys": sorted(tensors)[:3],
    }


def _counts(values: Iterable[float]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


def _components(names: Iterable[str], kind: str, metadata: Mapping[str, str]) -> dict[str, int]:
    """Layers by component, in the words of the file."""
    if kind == "embedding":
        return {}
    if kind in ("peft", "oft"):
        return {metadata.get("litp.component", "unet"): len(list(names))}
    parts = ("_".join(n.split("_")[:2]) if kind == "kohya" else keys.split(n)[0] for n in names)
    return dict(Counter(parts))


def _alphas(
    tensors: Mapping[str, Tensor], downs: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path
) -> list[float]:
    """Alpha of every layer that states one."""
    if own := [float(t) for k, t in tensors.items() if k.endswith(".alpha")]:
        return own
    component = metadata.get("litp.component", "unet")
    settings = settings_of(metadata, path, component)
    named = {n if keys.split(n)[0] in keys.COMPONENTS else f"{component}.{n}": t for n, t in downs.items()}
    return [stated_alpha(settings, name, t.shape[0]) for name, t in named.items()] if settings else []


def _tokens(tensors: Mapping[str, Tensor], kind: str, metadata: Mapping[str, str]) -> list[str]:
    """Trigger words: of an embedding, or those trained together with the file."""
    if "litp.token" in metadata:
        return [metadata["litp.token"]]
    if kind == "embedding":
        return [n for n in tensors if n not in ("clip_l", "clip_g", "emb_params")]
    try:
        return [str(token) for token in json.loads(metadata.get("litp.tokens", "[]"))]
    except (ValueError, TypeError, RecursionError):
        return [metadata["litp.tokens"]]
