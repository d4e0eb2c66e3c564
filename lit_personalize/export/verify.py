"""Prove exported files: reload them through the stock client, compare factors and a picture.

For LoRA files: s·B·A of every PEFT layer that `load_lora_weights` (or `PeftModel.from_pretrained`)
makes, against the adapter (relative error <= 1e-6 in fp32, or the file's declared error). For
embeddings: the rows that `load_textual_inversion` places. For merged pipelines: every weight that
`from_pretrained` reads. Then one picture of the stock pipeline against our own sampler.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import PICKLES, check_parts
from lit_personalize.backbones.token_rows import row_names
from lit_personalize.errors import VerificationError
from lit_personalize.export import keys
from lit_personalize.export.exporter import Exported
from lit_personalize.export.headers import encoder_of
from lit_personalize.export.inspect import kind_of
from lit_personalize.export.loading import read_adapter, read_file
from lit_personalize.export.picture import compare_merged, compare_pictures, place_embedding
from lit_personalize.export.pipeline import merged_pipeline
from lit_personalize.export.stock import comparison_scheduler, side_of, stock_pipeline

TOLERANCE = 1e-6
"""Relative error of a product of fp32 factors."""


@dataclass
class FileReport:
    """What the stock client made of one file."""

    file: str
    kind: str
    layers: int = 0
    largest_error: float = 0.0
    """Largest relative error of a layer's s·B·A."""
    allowed_error: float = TOLERANCE
    components: dict[str, int] = field(default_factory=dict)
    """Layers that changed, by component."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Layers by rank."""
    scales: dict[str, int] = field(default_factory=dict)
    """Layers by s = alpha / rank as the client applies it."""
    left_out: str = ""
    """What the file cannot hold of the change."""
    coverage: str = ""
    """Changed linear layers of attention in the UNet, of all."""


@dataclass
class VerifyReport:
    """All files of an adapter."""

    files: list[FileReport] = field(default_factory=list)
    picture_difference: float | None = None
    """Largest difference of a pixel in [0, 1] between the stock pipeline and our sampler."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def exported_of(paths: Sequence[Path]) -> list[Exported]:
    """Tell the kinds of files that were written elsewhere; a folder is PEFT's or a merged pipeline.

    Raises:
        DataError: A file is missing, a pickle, or damaged.
    """
    found = []
    for path in paths:
        if (path / "model_index.json").exists():
            found.append(Exported(path, "pipeline"))
            continue
        tensors, metadata = read_file(path / "adapter_model.safetensors" if path.is_dir() else path)
        kind = kind_of(tensors)
        encoder = encoder_of(metadata, path)
        if kind in ("peft", "oft") and not path.is_dir():
            path = path.parent
        found.append(Exported(path, kind, token=metadata.get("litp.token", ""), encoder=encoder))
    together = Path(os.path.commonpath([item.path.absolute().parent for item in found])) if found else None
    for item in found:
        item.path, item.folder = item.path.absolute(), together
    return found


def adapters_in(folder: Path) -> list[Path]:
    """Everything in an export's folder that can be verified: files, PEFT folders, a merged pipeline.

    Raises:
        DataError: A pickle lies among them.
    """
    for pickled in (p for p in sorted(folder.iterdir()) if p.suffix.lower() in PICKLES):
        read_file(pickled)
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("textual_inversion/*.safetensors"))
    merged = [folder / "pipeline"] if (folder / "pipeline" / "model_index.json").exists() else []
    return [*files, *sorted(p.parent for p in folder.glob("peft*/*/adapter_config.json")), *merged]


def verify(
    files: Sequence[Exported], base: Base, reference: AdapterWeights | None = None, prompt: str = "a photo"
) -> VerifyReport:
    """Check every file; without `reference` the files are compared with what our own reader finds in them.

    Raises:
        DataError: A file cannot be read.
        VerificationError: A file does not give back what was trained.
    """
    report = VerifyReport()
    differences = []
    pipe = stock_pipeline(base) if any(f.kind in ("diffusers", "kohya") for f in files) else None
    for item in files:
        if item.kind in ("diffusers", "kohya", "peft"):
            _refuse_lost_magnitudes(item)
            wanted = reference or read_adapter(item.path, base, force=True)
            # PEFT's wrapper replaces modules for good; the pipeline gives its layers back.
            client = stock_pipeline(base) if pipe is None or item.kind == "peft" else pipe
            report.files.append(_check_lora(item, base, wanted, client))
            if client is pipe:
                pipe.unload_lora_weights()
        elif item.kind == "oft":
            report.files.append(_check_oft(item, base, reference))
        elif item.kind == "embedding":
            report.files.append(_check_embedding(item, base, reference))
        elif item.kind in ("delta", "neurons"):
            report.files.append(_check_delta(item, base, reference))
        elif item.kind == "pipeline":
            found, difference = _check_pipeline(item, base, reference, prompt)
            report.files.append(found)
            differences.append(difference)
    del pipe
    differences.append(compare_pictures(files, base, prompt))
    drawn = [d for d in differences if d is not None]
    report.picture_difference = max(drawn) if drawn else None
    return report


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


# ---- LoRA -------------------------------------------------------------------------------------------


def _check_lora(item: Exported, base: Base, reference: AdapterWeights, pipe: Any) -> FileReport:
    """Load one file into the stock client and compare every layer's ΔW, one at a time."""
    wanted = {keys.portable(layer): layer for layer in reference.layers()}
    try:
        loaded = dict(_load_peft(item, base, pipe) if item.kind == "peft" else _load_lora(item, pipe))
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as refusal:
        raise VerificationError(f"{item.path}: the stock client does not load it: {refusal}") from refusal
    if item.kind == "peft":
        component = next(iter(loaded), "unet.").partition(".")[0]
        wanted = {name: layer for name, layer in wanted.items() if keys.split(name)[0] == component}
    if set(loaded) != set(wanted):
        missing, extra = sorted(set(wanted) - set(loaded)), sorted(set(loaded) - set(wanted))
        raise VerificationError(f"{item.path}: the client did not load {missing[:3]}, and loaded {extra[:3]} besides")
    declared = {keys.portable(n): e for n, e in item.errors.items()}
    report = FileReport(item.name, item.kind, len(loaded), left_out=item.left_out)
    for name, layer in wanted.items():
        client = loaded[name]
        found, delta = client.delta(), _product(reference, layer, client, item)
        error = _relative(found, delta) if float(delta.norm()) else float(found.abs().max())
        allowed = max(TOLERANCE, 1.01 * declared.get(name, 0.0) + TOLERANCE)
        report.largest_error = max(report.largest_error, error)
        report.allowed_error = max(report.allowed_error, allowed)
        if not error <= allowed:
            raise VerificationError(f"{item.path}: {name} comes back with relative error {error:.1e} > {allowed:.1e}")
    report.components = dict(Counter(keys.split(name)[0] for name in loaded))
    report.ranks = _counts(layer.rank for layer in loaded.values())
    report.scales = _counts(round(layer.scale, 6) for layer in loaded.values())
    attention = [f"unet.{p}" for p, m in base.unet.named_modules() if isinstance(m, nn.Linear) and ".attn" in p]
    report.coverage = f"{sum(name in loaded for name in attention)}/{len(attention)}"
    return report


def _refuse_lost_magnitudes(item: Exported) -> None:
    """Diffusers filters dora_scale out of kohya files, with a warning, and applies what is left."""
    if item.kind == "kohya" and any(name.endswith(keys.DORA_SCALE) for name in read_file(item.path)[0]):
        raise VerificationError(
            f"{item.path}: diffusers loads it without its magnitudes of DoRA (dora_scale) and draws other pictures; "
            "`litp sample` applies them, and `litp import --formats diffusers kohya` writes files that need none"
        )


def _product(reference: AdapterWeights, layer: str, client: _ClientLayer, item: Exported) -> Tensor:
    """What the client's s·B·A of a layer must be; with a magnitude, that is compared at once.

    Then ΔW is W0's affair, too, which the client may hold in another precision.
    """
    if client.magnitude is None:
        return reference.delta(layer)
    if layer not in reference.dora:
        raise VerificationError(f"{item.path}: the client gives {layer} a magnitude, which was not trained")
    dora = reference.dora[layer]
    error = _relative(client.magnitude, dora.magnitude)
    if not error <= TOLERANCE:
        raise VerificationError(f"{item.path}: the magnitude of {layer} comes back with relative error {error:.1e}")
    return dora.factors.delta()


def _counts(values: Iterator[float] | Iterator[int]) -> dict[str, int]:
    return {f"{value:g}": count for value, count in sorted(Counter(values).items())}


@dataclass
class _ClientLayer:
    """One layer as PEFT holds it."""

    up: Tensor
    """B `[out, R]`."""
    down: Tensor
    """A `[R, in]`."""
    scale: float
    magnitude: Tensor | None = None
    """m `[out]` of DoRA."""

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """s·B·A, `[out, in]`."""
        return self.scale * (self.up @ self.down)


def _client_layers(module: nn.Module, component: str, adapter: str) -> Iterator[tuple[str, _ClientLayer]]:
    """Every layer that PEFT wrapped in a module, by our portable name."""
    from peft.tuners.lora import LoraLayer

    for path, layer in module.named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A:
            up: Any = layer.lora_B[adapter].weight
            down: Any = layer.lora_A[adapter].weight
            factors = up.detach().flatten(1), down.detach().flatten(1)
            scaled = layer.lora_magnitude_vector[adapter] if adapter in layer.lora_magnitude_vector else None
            magnitude = None if scaled is None else scaled.weight.detach().flatten()
            yield keys.portable(f"{component}.{path}"), _ClientLayer(*factors, float(layer.scaling[adapter]), magnitude)


def _load_lora(item: Exported, pipe: Any) -> Iterator[tuple[str, _ClientLayer]]:
    pipe.load_lora_weights(item.path.parent, weight_name=item.path.name, adapter_name="checked")
    for component in keys.COMPONENTS:
        if pipe.components.get(component) is not None:
            yield from _client_layers(pipe.components[component], component, "checked")


def _load_peft(item: Exported, base: Base, pipe: Any) -> Iterator[tuple[str, _ClientLayer]]:
    from peft import PeftModel

    component = keys.split(read_adapter(item.path, base, force=True).layers()[0])[0]
    model = PeftModel.from_pretrained(pipe.components[component], item.path, adapter_name="checked")
    yield from _client_layers(model.base_model.model, component, "checked")


def _check_oft(item: Exported, base: Base, reference: AdapterWeights | None) -> FileReport:
    """Load a folder of rotations into PEFT and compare W0·(R - I)ᵀ of every layer, in fp64."""
    from peft import PeftModel
    from peft.tuners.oft import OFTLayer

    named = read_adapter(item.path, base, force=True)
    component = keys.split(named.layers()[0])[0]
    client = stock_pipeline(base).components[component]
    model = PeftModel.from_pretrained(client, item.path, adapter_name="checked").double()
    report = FileReport(item.name, item.kind, components={component: len(named.layers())})
    wanted = named if reference is None else reference
    for path, layer in model.base_model.model.named_modules():
        if not isinstance(layer, OFTLayer):
            continue
        name, weight = f"{component}.{path}", layer.get_base_layer().weight
        if name not in wanted.dense:
            raise VerificationError(f"{item.path}: the client rotates {name}, which was not trained")
        found = weight @ layer.get_delta_weight("checked").mT - weight
        error = _relative(found.detach(), wanted.dense[name]) if wanted.dense[name].any() else float(found.abs().max())
        if not error <= TOLERANCE:
            raise VerificationError(f"{item.path}: {name} comes back with relative error {error:.1e} > {TOLERANCE:.0e}")
        report.layers += 1
        report.largest_error = max(report.largest_error, error)
    trained = [layer for layer in wanted.rotations or wanted.dense if keys.split(layer)[0] == component]
    if report.layers != len(trained):
        raise VerificationError(f"{item.path}: the client rotates {report.layers} layers, {len(trained)} were trained")
    return report


# ---- embeddings, deltas, pipelines ------------------------------------------------------------------


def _check_embedding(item: Exported, base: Base, reference: AdapterWeights | None) -> FileReport:
    weights = read_adapter(item.path, base, force=True)
    ((token, rows),) = weights.tokens.items()
    first = item.encoder or 0
    if reference is not None:
        trained = reference.tokens[token]
        trained = trained if item.encoder is None else [trained[item.encoder]]
        if any(not torch.equal(a, b) for a, b in zip(rows, trained, strict=True)):
            raise VerificationError(f"{item.path}: the rows of {token} are not those that were trained")
    pipe = stock_pipeline(base)
    try:
        place_embedding(pipe, item, token, rows)
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        raise VerificationError(f"{item.path}: the stock client does not load it: {error}") from error
    for i, row in enumerate(rows):
        tokenizer, encoder = side_of(pipe, first + i)
        ids = tokenizer.convert_tokens_to_ids(row_names(token, len(row)))
        placed = encoder.get_input_embeddings().weight[ids].detach()
        if not torch.equal(placed, row):
            raise VerificationError(f"{item.path}: the client placed other rows for {token}")
    return FileReport(item.name, item.kind, len(rows))


def _check_delta(item: Exported, base: Base, reference: AdapterWeights | None) -> FileReport:
    read = read_adapter(item.path, base, force=True)
    kinds = ("neurons", "values") if item.kind == "neurons" else ("dense", "parameters")
    for kind in kinds:
        found: dict[str, Tensor] = getattr(read, kind)
        wanted: dict[str, Tensor] = getattr(reference or read, kind)
        if set(found) != set(wanted) or any(not torch.equal(d, wanted[n]) for n, d in found.items()):
            raise VerificationError(f"{item.path}: the {item.kind} are not what was trained")
    names = {name for kind in kinds for name in getattr(read, kind)}
    return FileReport(item.name, item.kind, len(names), components=dict(Counter(keys.split(n)[0] for n in names)))


def _check_pipeline(
    item: Exported, base: Base, reference: AdapterWeights | None, prompt: str
) -> tuple[FileReport, float | None]:
    """Load a merged pipeline as any user would; with a reference, compare every weight and a picture."""
    from diffusers import DiffusionPipeline

    check_parts(item.path)
    try:
        pipe = DiffusionPipeline.from_pretrained(
            item.path, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise VerificationError(f"{item.path}: the stock client does not load it: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = comparison_scheduler(pipe.scheduler)
    if "safety_checker" in pipe.components:
        pipe.safety_checker = None  # a picture that it blacks out cannot be compared
    report = FileReport(item.name, item.kind)
    if reference is None:
        return report, None
    report.layers = len(reference.layers())
    wanted = merged_pipeline(reference, base)
    for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if component in pipe.components:
            found, own = (p.components[component].state_dict() for p in (pipe, wanted))
            report.largest_error = max(report.largest_error, _compare_states(found, own, item.path, component))
    return report, compare_merged(pipe, base, reference, prompt, item.path)


def _compare_states(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path, component: str) -> float:
    if set(found) != set(wanted):
        raise VerificationError(f"{path}: {component} has other weights: {sorted(set(found) ^ set(wanted))[:3]}")
    largest = 0.0
    for name, value in wanted.items():
        error = _relative(found[name], value) if found[name].shape == value.shape else float("inf")
        if not error <= TOLERANCE:
            raise VerificationError(f"{path}: {component}.{name} differs from W0 + ΔW by {error:.1e} > {TOLERANCE:.0e}")
        largest = max(largest, error)
    return largest
