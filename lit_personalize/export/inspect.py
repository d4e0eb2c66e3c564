"""Look into an adapter file without loading a base."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from lit_personalize.export.loading import read_file


def inspect_file(path: Path) -> dict[str, Any]:
    """Format, ranks, alphas, tokens, metadata and size of one file."""
    tensors, metadata = read_file(path)
    downs = {k: t for k, t in tensors.items() if "lora_A" in k or "lora_down" in k or "lora.down" in k}
    kind = "kohya LoRA" if any(k.startswith("lora_") for k in tensors) else "diffusers LoRA" if downs else "embedding"
    if tensors and all(k.endswith(".delta") for k in tensors):
        kind = "dense delta"
    ranks = Counter(t.shape[0] for t in downs.values())
    alphas = Counter(float(t) for k, t in tensors.items() if k.endswith(".alpha"))
    return {
        "file": str(path),
        "format": kind,
        "bytes": path.stat().st_size,
        "tensors": len(tensors),
        "parameters": sum(t.numel() for t in tensors.values()),
        "layers": len(downs) or len(tensors),
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "alphas": {str(alpha): count for alpha, count in sorted(alphas.items())} or "as rank",
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}),
        "tokens": metadata.get("litp.token", metadata.get("litp.tokens", "")),
        "base": metadata.get("litp.base", "unknown"),
        "base_fingerprint": metadata.get("litp.base_fingerprint", "unknown"),
        "details": metadata.get("litp.details", ""),
    }
