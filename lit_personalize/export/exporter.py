"""Export what was learned in the formats that clients load."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lit_personalize.adapters.protocol import AdapterWeights, LowRank
from lit_personalize.adapters.shadow import layers_of
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.token_rows import pieces_of
from lit_personalize.errors import UsageError
from lit_personalize.export import files, keys
from lit_personalize.export.factorize import Kept, Truncation, factorize, summary
from lit_personalize.export.neurons import share_of, sparse_neurons
from lit_personalize.export.rotations import write_oft

log = logging.getLogger(__name__)
FORMATS = ("diffusers", "kohya", "peft", "delta", "neurons", "pipeline")


@dataclass
class Exported:
    """One written file (or PEFT folder, or pipeline directory)."""

    path: Path
    kind: str
    """diffusers, kohya, peft, oft, embedding, delta, neurons or pipeline."""
    errors: dict[str, float] = field(default_factory=dict)
    """Declared relative error of layers that were factored."""
    token: str = ""
    encoder: int | None = None
    """Which text encoder an embedding file is for; None where one file serves all."""
    left_out: str = ""
    """What a LoRA file cannot hold of the change, in words."""
    kept: str = ""
    """What a LoRA file holds of dense layers, in words."""
    folder: Path | None = None
    """The export's folder, which `name` leaves out."""

    @property
    def name(self) -> str:
        """The path within the export's folder."""
        inside = self.folder is not None and self.path.is_relative_to(self.folder)
        return self.path.relative_to(self.folder).as_posix() if inside and self.folder else self.path.name


def export(
    weights: AdapterWeights,
    folder: Path,
    base: Base,
    name: str,
    formats: Sequence[str] = ("diffusers", "kohya"),
    details: Mapping[str, object] | None = None,
    max_error: float = 1e-3,
    max_rank: int | None = None,
    energy: float | None = None,
    nuclear: float | None = None,
) -> list[Exported]:
    """Write `weights` into `folder`.

    Args:
        formats: "diffusers", "kohya" and "peft" write LoRA files (dense changes factored within `max_error`), but
            "peft" writes DoRA's factors and magnitudes, and rotations as a folder of PEFT's OFT, as they are; "delta"
            the exact dense changes; "neurons" the indices of concept neurons, with their values if trained;
            "pipeline" a merged pipeline. Learned embeddings are always written; for two text encoders one file with
            both, and with "diffusers" also one file each.
        details: Stored in every file's metadata (recipe, steps, run).
        max_error: Largest relative Frobenius error of a factored layer; 0 keeps every singular value.
        max_rank: Bound on the rank of a factored layer, which goes before the other rules.
        energy: See `Truncation`, as `nuclear`. Whatever the rule, the error is declared, and the file says what it
            kept.

    Raises:
        UsageError: An unknown format, or what `Truncation` refuses.
    """
    if unknown := [f for f in formats if f not in FORMATS]:
        raise UsageError(f"unknown export format {unknown[0]!r}; use {', '.join(FORMATS)}")
    how = Truncation(max_error, max_rank, energy, nuclear)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Exported] = []
    chosen = [f for f in ("diffusers", "kohya", "peft") if f in formats]
    if chosen and (weights.low_rank or weights.dense):
        described = describe(weights, base, name, "lora", details)
        loras: list[Exported] = []
        kept = ""
        if left_out := _left_out(weights):
            described["litp.left_out"] = left_out
            log.warning("a LoRA file leaves out %s; the formats pipeline and delta hold them", left_out)
        dora = _components_of_dora(weights) if "peft" in chosen else []
        loras += _write_dora(weights, dora, folder, described)
        if chosen != ["peft"] or any(keys.split(layer)[0] not in dora for layer in weights.layers()):
            exact = set(weights.rotations) if chosen == ["peft"] else set()
            low_rank, found = _all_low_rank(weights, base, how, exact)
            errors = {layer: layer_kept.error for layer, layer_kept in found.items()}
            described["litp.largest_error"] = repr(max(errors.values(), default=0.0))
            if kept := summary(list(found.values()), how):
                described["litp.kept"] = kept
                log.info("LoRA files hold %s", kept)
            for_peft = {layer: f for layer, f in low_rank.items() if layer not in weights.rotations}
            loras += _write_loras(low_rank, for_peft, errors, folder, base, name, chosen, described, dora)
        written += [replace(item, left_out=left_out, kept=kept if item.errors else "") for item in loras]
    if "peft" in formats:
        described = describe(weights, base, name, "oft", details)
        for component in dict.fromkeys(keys.split(layer)[0] for layer in weights.rotations):
            path = write_oft(folder / "peft_oft" / component, weights.rotations, component, described)
            written.append(Exported(path, "oft"))
    written += _write_embeddings(weights, folder, base, name, "diffusers" in formats, details)
    if (weights.dense or weights.parameters) and "delta" in formats:
        path = folder / f"{file_stem(name)}.delta.safetensors"
        described = describe(weights, base, name, "delta", details)
        changes = files.dense_deltas({**weights.dense, **weights.parameters})
        written.append(Exported(files.write_safetensors(path, changes, described), "delta"))
    if weights.neurons and "neurons" in formats:
        path = folder / f"{file_stem(name)}.neurons.safetensors"
        described = describe(weights, base, name, "neurons", details)
        shapes = {keys.portable(layer): list(weights.dense[layer].shape) for layer in weights.neurons}
        described["litp.neurons"] = json.dumps({"shapes": shapes, "share": share_of(weights)}, sort_keys=True)
        tensors = sparse_neurons(weights)
        written.append(Exported(files.write_safetensors(path, tensors, described), "neurons"))
    if "pipeline" in formats:
        from lit_personalize.export.pipeline import write_pipeline

        written.append(Exported(write_pipeline(weights, base, folder / "pipeline"), "pipeline"))
    for item in written:
        item.folder = folder
    return written


def file_stem(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def architecture(base: Base) -> str:
    """The base's name in the ModelSpec standard (1.0.1)."""
    if base.family == "sdxl":
        return "stable-diffusion-xl-v1-base"
    if not base.unet.config.use_linear_projection:  # SD2 projects into its transformers by linear layers, SD1 by 1x1
        return "stable-diffusion-v1"
    return "stable-diffusion-v2-768-v" if prediction_type(base) == "v" else "stable-diffusion-v2-512"


def prediction_type(base: Base) -> str:
    return "v" if base.scheduler.config.prediction_type == "v_prediction" else "epsilon"


def describe(
    weights: AdapterWeights, base: Base, name: str, kind: str, details: Mapping[str, object] | None
) -> dict[str, str]:
    """Metadata of every file: ours, ModelSpec's, and what managers of kohya files show. All values are strings."""
    details = dict(details or {})
    tokens = sorted(weights.tokens)
    found = {
        "litp.base_fingerprint": base.fingerprint, "litp.base": Path(base.source).name, "litp.family": base.family,
        "litp.details": json.dumps(details, sort_keys=True, default=str), "litp.tokens": json.dumps(tokens),
        "modelspec.sai_model_spec": "1.0.1", "modelspec.title": name,
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.architecture": f"{architecture(base)}/{kind}", "modelspec.prediction_type": prediction_type(base),
        "modelspec.resolution": f"{base.resolution}x{base.resolution}",
        "ss_base_model_version": {"stable-diffusion-xl-v1-base": "sdxl_base_v1-0"}.get(
            architecture(base), "sd_v2" if "v2" in architecture(base) else "sd_v1"
        ),
        "ss_output_name": name, "ss_resolution": f"({base.resolution}, {base.resolution})",
    }  # fmt: skip
    if base.zero_terminal_snr:
        found["ss_zero_terminal_snr"] = "True"
    if tokens:
        found["modelspec.trigger_phrase"] = ", ".join(tokens)
    if "steps" in details:
        found["ss_steps"] = str(details["steps"])
    return found


def _write_loras(
    low_rank: Mapping[str, LowRank],
    for_peft: Mapping[str, LowRank],
    errors: dict[str, float],
    folder: Path,
    base: Base,
    name: str,
    formats: Sequence[str],
    described: Mapping[str, str],
    done: Sequence[str] = (),
) -> list[Exported]:
    """Write factors in every format; PEFT's not for the components that are `done`."""
    written = []
    if "diffusers" in formats:
        tensors, extra = files.diffusers_lora(low_rank)
        path = folder / "pytorch_lora_weights.safetensors"
        written.append(Exported(files.write_safetensors(path, tensors, {**described, **extra}), "diffusers", errors))
    if "kohya" in formats:
        tensors = files.kohya_lora(low_rank, len(base.text_encoders) == 2)
        alpha = next(float(t) for k, t in tensors.items() if k.endswith(".alpha"))
        extra = {
            "ss_network_module": "networks.lora", "ss_network_alpha": str(alpha),
            "ss_network_dim": str(max(f.rank for f in low_rank.values())),
        }  # fmt: skip
        path = folder / f"{file_stem(name)}.kohya.safetensors"
        written.append(Exported(files.write_safetensors(path, tensors, {**described, **extra}), "kohya", errors))
    if "peft" in formats:
        for component in (c for c in dict.fromkeys(keys.split(layer)[0] for layer in for_peft) if c not in done):
            path = files.write_peft(folder / "peft" / component, for_peft, component, described)
            own = {layer: e for layer, e in errors.items() if keys.split(layer)[0] == component}
            written.append(Exported(path, "peft", own))
    return written


def _components_of_dora(weights: AdapterWeights) -> list[str]:
    """Components that PEFT can load with magnitudes: it takes them for all layers of a folder, or for none."""
    components = dict.fromkeys(keys.split(layer)[0] for layer in weights.dora)
    return [c for c in components if all(n in weights.dora for n in weights.layers() if keys.split(n)[0] == c)]


def _write_dora(
    weights: AdapterWeights, components: Sequence[str], folder: Path, described: Mapping[str, str]
) -> list[Exported]:
    written = []
    for component in components:
        own = {layer: dora for layer, dora in weights.dora.items() if keys.split(layer)[0] == component}
        factors = {layer: dora.factors for layer, dora in own.items()}
        magnitudes = {layer: dora.magnitude for layer, dora in own.items()}
        path = files.write_peft(folder / "peft" / component, factors, component, described, magnitudes)
        written.append(Exported(path, "peft"))
    return written


def _write_embeddings(
    weights: AdapterWeights,
    folder: Path,
    base: Base,
    name: str,
    one_each: bool,
    details: Mapping[str, object] | None,
) -> list[Exported]:
    """One file per token; for two text encoders and `one_each`, also the pair that diffusers' scripts write."""
    written = []
    for token, rows in weights.tokens.items():
        described = describe(weights, base, name, "textual-inversion", details) | {"litp.token": token}
        label = "" if len(weights.tokens) == 1 else "_" + (re.sub(r"\W+", "", token) or "token")
        path = folder / f"learned_embeds{label}.safetensors"
        files.write_safetensors(path, files.learned_embeds(token, rows), described)
        written.append(Exported(path, "embedding", token=token))
        if len(rows) == 1 or not one_each or pieces_of(token):  # a file of its own cannot name its rows
            continue
        for i, own in enumerate(rows):
            suffix = "" if i == 0 else f"_{i + 1}"
            path = folder / "textual_inversion" / f"learned_embeds{label}{suffix}.safetensors"
            files.write_safetensors(path, {token: own}, {**described, "litp.encoder": str(i)})
            written.append(Exported(path, "embedding", token=token, encoder=i))
    return written


def _left_out(weights: AdapterWeights) -> str:
    """The share of the change that is in no layer's matrix, by number and by squared size; "" if there is none."""
    changed = list(weights.parameters.values())
    if not changed:
        return ""
    matrices = list(weights.deltas().values())
    numbers = [sum(t.numel() for t in part) for part in (changed, matrices)]
    squares = [sum(float(t.double().square().sum()) for t in part) for part in (changed, matrices)]
    shares = [part[0] / (sum(part) or 1) for part in (numbers, squares)]
    return (
        f"the changes of {len(changed)} parameters such as biases, norms and embeddings "
        f"({shares[0]:.2%} of the weights, {shares[1]:.2%} of the squared change)"
    )


def _all_low_rank(
    weights: AdapterWeights, base: Base, how: Truncation, exact: Collection[str]
) -> tuple[dict[str, LowRank], dict[str, Kept]]:
    """Low-rank layers as they are, dense ones factored; those of `exact` are left out.

    Where a layer has both, ranks are concatenated.
    """
    low_rank, kept = dict(weights.low_rank), {}
    layers = layers_of(base.components())
    for layer, delta in weights.dense.items():
        if layer in exact:
            continue
        factored, kept[layer] = factorize(delta, how)
        factored = factored.shaped(layers[layer].weight.shape)
        low_rank[layer] = low_rank[layer].concatenate(factored) if layer in low_rank else factored
    return low_rank, kept
