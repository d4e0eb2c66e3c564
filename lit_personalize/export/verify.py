"""Prove exported files: reload them through the stock client, compare factors and a picture.

For LoRA files: s·B·A of every PEFT layer that `load_lora_weights` makes, against the adapter
(relative error <= 1e-6 in fp32, or the file's declared error). For embeddings: the rows that
`load_textual_inversion` places. Then one picture of the stock pipeline against our own sampler.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.errors import VerificationError
from lit_personalize.export import keys
from lit_personalize.export.exporter import Exported
from lit_personalize.export.loading import load_adapter, read_adapter
from lit_personalize.export.stock import stock_pipeline
from lit_personalize.sampling.sampler import SamplingOptions, generate, start_noise

TOLERANCE = 1e-6
PICTURE_TOLERANCE = 1 / 255


@dataclass
class FileReport:
    """What the stock client made of one file."""

    file: str
    kind: str
    layers: int = 0
    largest_error: float = 0.0
    """Largest relative error of a layer's s·B·A."""
    allowed_error: float = TOLERANCE


@dataclass
class VerifyReport:
    """All files of an adapter."""

    files: list[FileReport] = field(default_factory=list)
    picture_difference: float | None = None
    """Largest difference of a pixel in [0, 1] between the stock pipeline and our sampler."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def exported_of(paths: Sequence[Path]) -> list[Exported]:
    """Guess the kind of files that were written elsewhere."""
    found = []
    for path in paths:
        names = list(load_file(path)) if path.suffix == ".safetensors" else []
        kind = "kohya" if any(n.startswith("lora_") for n in names) else "diffusers"
        kind = "delta" if names and all(n.endswith(".delta") for n in names) else kind
        kind = "embedding" if not any("lora" in n for n in names) and kind != "delta" else kind
        found.append(Exported(path, kind))
    return found


def verify(
    files: Sequence[Exported], base: Base, reference: AdapterWeights | None = None, prompt: str = "a photo"
) -> VerifyReport:
    """Check every file; without `reference` the files are compared with what our own reader finds in them.

    Raises:
        VerificationError: A file does not give back what was trained.
    """
    report = VerifyReport()
    for item in files:
        if item.kind in ("diffusers", "kohya"):
            wanted = reference or read_adapter(item.path, base, force=True)
            report.files.append(_check_lora(item, base, wanted))
        elif item.kind == "embedding":
            report.files.append(_check_embedding(item, base, reference))
        elif item.kind == "delta":
            report.files.append(_check_delta(item, base, reference))
    report.picture_difference = _compare_pictures(files, base, prompt)
    return report


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


def _check_lora(item: Exported, base: Base, reference: AdapterWeights) -> FileReport:
    from peft.tuners.lora import LoraLayer

    pipe = stock_pipeline(base)
    pipe.load_lora_weights(item.path.parent, weight_name=item.path.name, adapter_name="checked")
    found: dict[str, Tensor] = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        module = pipe.components.get(component)
        for path, layer in module.named_modules() if module is not None else ():
            if isinstance(layer, LoraLayer) and "checked" in layer.lora_A:
                product = layer.lora_B["checked"].weight @ layer.lora_A["checked"].weight
                found[keys.portable(f"{component}.{path}")] = (layer.scaling["checked"] * product).detach()
    wanted = {keys.portable(n): delta for n, delta in reference.deltas().items()}
    if set(found) != set(wanted):
        missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
        raise VerificationError(f"{item.path}: the client did not load {missing[:3]}, and loaded {extra[:3]} besides")
    declared = {keys.portable(n): e for n, e in item.errors.items()}
    report = FileReport(item.path.name, item.kind, len(found))
    for name, delta in wanted.items():
        error = _relative(found[name], delta) if float(delta.norm()) else float(found[name].abs().max())
        allowed = max(TOLERANCE, 1.01 * declared.get(name, 0.0) + TOLERANCE)
        report.largest_error = max(report.largest_error, error)
        report.allowed_error = max(report.allowed_error, allowed)
        if not error <= allowed:
            raise VerificationError(f"{item.path}: {name} comes back with relative error {error:.1e} > {allowed:.1e}")
    return report


def _check_embedding(item: Exported, base: Base, reference: AdapterWeights | None) -> FileReport:
    weights = read_adapter(item.path, base, force=True)
    ((token, rows),) = weights.tokens.items()
    if reference is not None and any(not torch.equal(a, b) for a, b in zip(rows, reference.tokens[token], strict=True)):
        raise VerificationError(f"{item.path}: the rows of {token} are not those that were trained")
    pipe = stock_pipeline(base)
    _load_embedding(pipe, token, rows, item.path)
    for i, row in enumerate(rows):
        tokenizer, encoder = _side(pipe, i)
        ids = tokenizer.convert_tokens_to_ids([token, *(f"{token}_{n}" for n in range(1, len(row)))])
        placed = encoder.get_input_embeddings().weight[ids].detach()
        if not torch.equal(placed, row):
            raise VerificationError(f"{item.path}: the client placed other rows for {token}")
    return FileReport(item.path.name, item.kind, len(rows))


def _side(pipe: Any, index: int) -> tuple[Any, Any]:
    suffix = "" if index == 0 else f"_{index + 1}"
    return pipe.components[f"tokenizer{suffix}"], pipe.components[f"text_encoder{suffix}"]


def _load_embedding(pipe: Any, token: str, rows: list[Tensor], path: Path) -> None:
    """As a user would: the file itself for one encoder, `clip_l` and `clip_g` by name for two."""
    if len(rows) == 1:
        pipe.load_textual_inversion(path.parent, weight_name=path.name, token=token)
        return
    state = load_file(path)
    for i, key in enumerate(("clip_l", "clip_g")):
        tokenizer, encoder = _side(pipe, i)
        pipe.load_textual_inversion({token: state[key]}, token=token, text_encoder=encoder, tokenizer=tokenizer)


def _check_delta(item: Exported, base: Base, reference: AdapterWeights | None) -> FileReport:
    found = read_adapter(item.path, base, force=True).dense
    if reference is not None and (
        set(found) != set(reference.dense) or any(not torch.equal(d, reference.dense[n]) for n, d in found.items())
    ):
        raise VerificationError(f"{item.path}: the deltas are not those that were trained")
    return FileReport(item.path.name, item.kind, len(found))


def _compare_pictures(files: Sequence[Exported], base: Base, prompt: str, steps: int = 4) -> float | None:
    """Draw one picture with the stock pipeline and with our sampler, from the same files and noise."""
    loras = sorted((f for f in files if f.kind in ("diffusers", "kohya")), key=lambda f: f.kind)
    lora = loras[0].path if loras else None
    embeddings = [f.path for f in files if f.kind == "embedding"]
    if lora is None and not embeddings:
        return None
    pipe = stock_pipeline(base)
    if lora is not None:
        pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    for path in embeddings:
        ((token, rows),) = read_adapter(path, base, force=True).tokens.items()
        _load_embedding(pipe, token, rows, path)
    fresh = load_base(base.source, config=base.config)
    adapter = load_adapter([p for p in (lora, *embeddings) if p], fresh, force=True)
    options = SamplingOptions(steps=steps, guidance=3.0)
    ours = generate(fresh, [prompt], [0], [adapter], options)[0] / 255.0
    side = {"height": fresh.resolution, "width": fresh.resolution}
    stock = pipe(prompt, negative_prompt="", num_inference_steps=steps, guidance_scale=3.0,
                 latents=start_noise(fresh, [0]), output_type="np", **side).images[0]  # fmt: skip
    difference = float(np.abs(np.round(stock * 255) / 255 - ours).max())
    if difference > PICTURE_TOLERANCE + 1e-6:
        raise VerificationError(f"the stock pipeline draws another picture: pixels differ by up to {difference:.4f}")
    return difference
