"""Export what was learned in the formats that clients load."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lit_personalize.adapters.protocol import AdapterWeights, LowRank
from lit_personalize.backbones.base import Base
from lit_personalize.errors import UsageError
from lit_personalize.export import files
from lit_personalize.export.factorize import factorize

ARCHITECTURES = {"sd": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base"}
FORMATS = ("diffusers", "kohya", "delta", "pipeline")


@dataclass
class Exported:
    """One written file (or pipeline directory)."""

    path: Path
    kind: str
    """diffusers, kohya, embedding, delta or pipeline."""
    errors: dict[str, float] = field(default_factory=dict)
    """Declared relative error of layers that were factored."""
    token: str = ""


def export(
    weights: AdapterWeights,
    folder: Path,
    base: Base,
    name: str,
    formats: Sequence[str] = ("diffusers", "kohya"),
    details: Mapping[str, object] | None = None,
    max_error: float = 1e-3,
) -> list[Exported]:
    """Write `weights` into `folder`.

    Args:
        formats: "diffusers" and "kohya" write LoRA files (dense changes factored within `max_error`)
            and learned embeddings; "delta" the exact dense changes; "pipeline" a merged pipeline.
        details: Stored in every file's metadata (recipe, steps, run).

    Raises:
        UsageError: An unknown format.
    """
    if unknown := [f for f in formats if f not in FORMATS]:
        raise UsageError(f"unknown export format {unknown[0]!r}; use {', '.join(FORMATS)}")
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^\w.-]+", "-", name)
    metadata = {
        "litp.base_fingerprint": base.fingerprint, "litp.base": Path(base.source).name, "litp.family": base.family,
        "litp.details": json.dumps(dict(details or {}), sort_keys=True, default=str),
        "litp.tokens": json.dumps(sorted(weights.tokens)), "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": name, "modelspec.architecture": f"{ARCHITECTURES[base.family]}/lora",
        "modelspec.trigger_phrase": ", ".join(sorted(weights.tokens)),
    }  # fmt: skip
    written: list[Exported] = []
    wants_lora = {"diffusers", "kohya"} & set(formats) and (weights.low_rank or weights.dense)
    low_rank, errors = _all_low_rank(weights, max_error) if wants_lora else ({}, {})
    if low_rank and "diffusers" in formats:
        tensors, extra = files.diffusers_lora(low_rank)
        path = folder / "pytorch_lora_weights.safetensors"
        written.append(Exported(files.write_safetensors(path, tensors, {**metadata, **extra}), "diffusers", errors))
    if low_rank and "kohya" in formats:
        tensors = files.kohya_lora(low_rank, len(base.text_encoders) == 2)
        ranks = [f.rank for f in low_rank.values()]
        first = next(iter(low_rank.values()))
        extra = {
            "ss_network_module": "networks.lora", "ss_network_dim": str(max(ranks)),
            "ss_network_alpha": str(first.alpha), "ss_output_name": name,
        }  # fmt: skip
        path = folder / f"{stem}.kohya.safetensors"
        written.append(Exported(files.write_safetensors(path, tensors, {**metadata, **extra}), "kohya", errors))
    for token, rows in weights.tokens.items():
        label = re.sub(r"\W+", "", token) or "token"
        file = "learned_embeds.safetensors" if len(weights.tokens) == 1 else f"learned_embeds_{label}.safetensors"
        tensors = files.learned_embeds(token, rows)
        path = files.write_safetensors(folder / file, tensors, {**metadata, "litp.token": token})
        written.append(Exported(path, "embedding", token=token))
    if weights.dense and "delta" in formats:
        path = folder / f"{stem}.delta.safetensors"
        written.append(Exported(files.write_safetensors(path, files.dense_deltas(weights.dense), metadata), "delta"))
    if "pipeline" in formats:
        from lit_personalize.export.pipeline import write_pipeline

        written.append(Exported(write_pipeline(weights, base, folder / "pipeline"), "pipeline"))
    return written


def _all_low_rank(weights: AdapterWeights, max_error: float) -> tuple[dict[str, LowRank], dict[str, float]]:
    """Low-rank layers as they are, dense ones factored; where a layer has both, ranks are concatenated."""
    low_rank, errors = dict(weights.low_rank), {}
    for layer, delta in weights.dense.items():
        factored, errors[layer] = factorize(delta, max_error)
        low_rank[layer] = low_rank[layer].concatenate(factored) if layer in low_rank else factored
    return low_rank, errors
