"""Read adapter files into `AdapterWeights`, strictly: known keys, right shapes, finite values, no pickle."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lit_personalize.adapters.loaded import LoadedAdapter
from lit_personalize.adapters.protocol import AdapterWeights, Dora, LowRank
from lit_personalize.adapters.shadow import all_parameters, layers_of, matrix_shape
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import PICKLES
from lit_personalize.errors import DataError
from lit_personalize.export import keys, rotations
from lit_personalize.export.files import FORMAT_VERSION
from lit_personalize.export.headers import refuse_repeated_names
from lit_personalize.export.neurons import INDEX, VALUE, parse_neurons
from lit_personalize.export.pickled import is_pickle

log = logging.getLogger(__name__)
LORA_FILES = (
    "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "*.kohya.safetensors",
    "peft/*/adapter_model.safetensors", "peft_oft/*/adapter_model.safetensors",
    "*.neurons.safetensors", "*.delta.safetensors",
)  # fmt: skip
"""Names by which a folder's LoRA is found, the first that is there."""
NOTICEABLE = 0.01
"""Declared relative error of a layer above which reading a file warns of it."""
LORA = re.compile(
    r"^(?P<layer>.+?)\.(?:lora_(?P<ab>[AB])(?:\.\w+)?|lora\.(?P<ud>up|down)|lora_(?P<k>up|down))\.weight$"
)


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of one safetensors file.

    Raises:
        DataError: Missing, a pickle under any name, damaged, empty, of a newer format, or with values that are no
            finite floating-point numbers.
    """
    if not path.is_file():
        raise DataError(f"adapter file {path} does not exist")
    if path.suffix.lower() in PICKLES or is_pickle(path):
        raise DataError(f"{path} is a pickle: loading one can run any code; `litp import` takes the weights out of it")
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a whole safetensors file: {error}") from error
    refuse_repeated_names(path)
    version = metadata.get("litp.format_version", FORMAT_VERSION)
    if not version.isdecimal() or int(version) > int(FORMAT_VERSION):
        raise DataError(f"{path} has format version {version}, this program reads up to {FORMAT_VERSION}; upgrade it")
    check_tensors(tensors, path)
    return tensors, metadata


def check_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that no adapter has.

    Raises:
        DataError: There is none, or one with values that are no finite floating-point numbers.
    """
    if not tensors:
        raise DataError(f"{path} holds no tensor")
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() or (name.endswith(INDEX) and tensor.dtype == torch.int32)):
            raise DataError(f"{path}: {name} is {tensor.dtype}; adapters hold floating-point numbers")
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{path}: {name} holds NaN or infinite values")


def read_adapter(paths: Path | Iterable[Path], base: Base, force: bool = False) -> AdapterWeights:
    """Read one adapter from its file, its files, or a folder of them.

    Args:
        force: Accept a file that was made for another base, if shapes fit.

    Raises:
        DataError: See `read_file`; or a key that names no layer of the base, half a pair of factors, a shape that
            does not fit, another base, files of different steps.
    """
    weights = AdapterWeights()
    steps: dict[str, Path] = {}
    for path in _expand(paths):
        tensors, metadata = read_file(path)
        steps.setdefault(_step_of(metadata), path)
        made_for = metadata.get("litp.base_fingerprint", base.fingerprint)
        if made_for != base.fingerprint and not force:
            raise DataError(
                f"{path} was trained on base {metadata.get('litp.base', '?')} ({made_for}), this is {base.source} "
                f"({base.fingerprint}); give that base. A copy of it in another precision (fp16 instead of fp32) or "
                "layout (one file instead of a directory) has another fingerprint, too: where this is one, add --force "
                "(in Python force=True)"
            )
        warn_of_loss(metadata, path)
        weights = weights.merge(parse(tensors, metadata, base, path))
    known = {step: path for step, path in steps.items() if step}
    if len(known) > 1 and not force:
        found = ", ".join(f"{path.name} of step {step}" for step, path in known.items())
        raise DataError(f"these files are of different steps of a run: {found}; export them again, or name one file")
    return weights


def warn_of_loss(metadata: Mapping[str, str], path: Path) -> None:
    """Say that a LoRA is only near to what was trained, where its file says so."""
    if left_out := metadata.get("litp.left_out"):
        log.warning("%s leaves out %s", path, left_out)
    try:
        error = float(metadata.get("litp.largest_error", 0))
    except ValueError:
        return  # another program's word for it
    if error > NOTICEABLE:
        log.warning("%s holds its layers with a relative error of up to %.2f; name another file for more", path, error)


def exports_of(place: Path) -> Path:
    """A run's exports, or the file or folder itself."""
    return place / "exports" if (place / "exports").is_dir() else place


def _step_of(metadata: Mapping[str, str]) -> str:
    """The training step at which a file was exported, or nothing."""
    try:
        return str(json.loads(metadata.get("litp.details", "{}")).get("steps", ""))
    except (ValueError, AttributeError, RecursionError):
        return ""  # details are free text to other programs


def load_adapter(
    paths: Path | Iterable[Path],
    base: Base,
    scale: float = 1.0,
    force: bool = False,
    blocks: Mapping[str, float] | None = None,
) -> LoadedAdapter:
    """Read and attach an adapter; it is active at once. For `scale` and `blocks` see `LoadedAdapter`.

    Files that say they were trained with zero terminal SNR put a base of v-prediction on that schedule.
    """
    name = str(paths) if isinstance(paths, Path | str) else "+".join(Path(p).name for p in paths)
    files = _expand(paths)
    adapter = LoadedAdapter(read_adapter(files, base, force), name, scale, blocks)
    adapter.attach(base)
    if base.schedule.prediction_type == "v_prediction" and any(_has_zero_terminal_snr(path) for path in files):
        base.use_zero_terminal_snr()
    return adapter


def _has_zero_terminal_snr(path: Path) -> bool:
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("ss_zero_terminal_snr") == "True"


def _expand(paths: Path | Iterable[Path]) -> list[Path]:
    """Files of an adapter: of a folder, its LoRA in one format and every embedding; else its only file.

    Raises:
        DataError: The folder holds nothing that is known by its name.
    """
    if not isinstance(paths, Path | str):
        return [Path(p) for p in paths]
    path = Path(paths)
    if not path.is_dir():
        return [path]
    embeddings = sorted(path.glob("learned_embeds*.safetensors"))
    for pattern in LORA_FILES:
        if found := sorted(path.glob(pattern)):
            if len(found) > 1 and not pattern.startswith("peft"):
                raise DataError(f"{path} holds {len(found)} files {pattern}; name one of them")
            return [*found, *embeddings]
    others = sorted(path.glob("*.safetensors"))
    if not embeddings and len(others) != 1:
        raise DataError(f"{path} holds no pytorch_lora_weights, adapter_model or learned_embeds .safetensors file")
    return embeddings or others


def parse(tensors: dict[str, Tensor], metadata: dict[str, str], base: Base, path: Path) -> AdapterWeights:
    """Recognise the format by its keys."""
    if set(tensors) <= {"clip_l", "clip_g"} or "litp.token" in metadata or _is_one_embedding(tensors):
        return AdapterWeights(tokens=_parse_embedding(tensors, metadata, path))
    parts = {c: module for c, module in base.components().items() if c != "vae"}
    layers = layers_of(parts)
    shapes = {layer: matrix_shape(module) for layer, module in layers.items()}
    stages = base.unet.config.layers_per_block
    style = "kohya" if any(k.startswith("lora_") for k in tensors) else "portable"
    known = keys.index_by(shapes, len(parts) == 3, style, stages if isinstance(stages, int) else None)
    own = {layer: cast(Tensor, module._parameters["weight"]) for layer, module in layers.items()}
    magnitudes: dict[str, Tensor] = {}
    if any(rotations.MARK in k for k in tensors):
        component = component_of(metadata, path)
        settings = {k.partition(".")[2]: v for k, v in settings_of(metadata, path, component).items()}
        named = {_known(k.partition(rotations.MARK)[0], known, path, component): t for k, t in tensors.items()}
        weights = rotations.parse_rotations(named, settings, own, path)
    elif all(k.endswith((INDEX, VALUE)) for k in tensors):
        weights = parse_neurons(tensors, lambda name: _known(name, known, path), own, path)
    elif all(k.endswith(".delta") for k in tensors):
        weights = _parse_deltas(tensors, known, parts, path)
    else:
        factors, magnitudes = _without_magnitudes(tensors, metadata, known, path)
        weights = AdapterWeights(low_rank=_parse_lora(factors, metadata, known, path))
    _check_shapes(weights, shapes, path)
    # Some tools write a linear layer's factors as 1x1 convolutions.
    weights.low_rank = {name: f.shaped(layers[name].weight.shape) for name, f in weights.low_rank.items()}
    for layer, magnitude in magnitudes.items():
        frozen = own[layer].detach().flatten(1).float().cpu()
        _rescale(weights, layer, magnitude, frozen, path)
    return weights


def _rescale(weights: AdapterWeights, layer: str, magnitude: Tensor, frozen: Tensor, path: Path) -> None:
    """Make a layer's factors what they are with DoRA's magnitude: ΔW = m·(W0 + s·B·A) / ‖W0 + s·B·A‖ - W0.

    One number per output is the paper's (eq. 5). LyCORIS files may hold one per input instead, `[1, in]`, with norms
    over the outputs; no client's format says that, so only its ΔW is kept.
    """
    factors = weights.low_rank.pop(layer, None)
    inputs = frozen.shape[1] if factors is None else factors.down.shape[1]
    per_input = magnitude.ndim > 1 and magnitude.shape[0] == 1 != frozen.shape[0] and magnitude.numel() == inputs
    if factors is None or not (per_input or magnitude.numel() == frozen.shape[0]):
        raise DataError(f"{path}: the magnitude of {layer} has no factors, or is not one number per output")
    if not per_input:
        weights.dora[layer] = Dora(factors, magnitude.flatten())
        weights.dense[layer] = weights.dora[layer].delta(frozen)
        return
    merged = (frozen + factors.delta()).reshape(len(frozen), inputs, -1)  # of a convolution, taps count as outputs
    norm = merged.norm(dim=(0, 2), keepdim=True)
    weights.dense[layer] = (magnitude.reshape(1, inputs, 1) / norm * merged).flatten(1) - frozen


def _without_magnitudes(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], known: Mapping[str, str], path: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The other tensors, and DoRA's m by layer: PEFT's as `[out]`, kohya's `[out, 1]` as it is."""
    component = component_of(metadata, path)
    found: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name, dot, part = key.removesuffix(".weight").rpartition(".")
        if dot and part == keys.MAGNITUDE:
            found[_known(name, known, path, component)] = tensor.float().flatten()
        elif dot and part == keys.DORA_SCALE:
            found[_known(name, known, path, component)] = tensor.float()
        else:
            others[key] = tensor
    return others, found


def _parse_deltas(
    tensors: Mapping[str, Tensor], layers: Mapping[str, str], parts: Mapping[str, nn.Module], path: Path
) -> AdapterWeights:
    """Changes of whole layers, and of other parameters by their full names."""
    weights = AdapterWeights()
    shapes = {f"{c}.{p}": getattr(*found).shape for c, m in parts.items() for p, found in all_parameters(m).items()}
    others = keys.index_by(shapes, False, "portable")
    for key, tensor in tensors.items():
        name = key.removesuffix(".delta")
        if name in layers or name not in others:
            weights.dense[_known(name, layers, path)] = tensor.float()
        elif tensor.shape != shapes[others[name]]:
            raise DataError(
                f"{path}: {name} is {tuple(tensor.shape)}, the base has {tuple(shapes[others[name]])}; "
                "the file was made for another base"
            )
        else:
            weights.parameters[others[name]] = tensor.float()
    return weights


def _is_one_embedding(tensors: Mapping[str, Tensor]) -> bool:
    (name, tensor), *more = tensors.items()
    return not more and tensor.ndim <= 2 and "lora" not in name and not name.endswith((".delta", INDEX, VALUE))


def _parse_embedding(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> dict[str, list[Tensor]]:
    """Rows `[n, d]` per text encoder; a file that does not say its token is named by its file, as other clients do."""
    named = [k for k in tensors if k not in ("clip_l", "clip_g", "emb_params")]
    token = metadata.get("litp.token") or (named[0] if named else f"<{path.stem}>")
    rows = [tensors[k] for k in ("clip_l", "clip_g") if k in tensors] or list(tensors.values())
    if wrong := [r for r in rows if r.ndim not in (1, 2)]:
        raise DataError(f"{path}: the embedding of {token} has shape {tuple(wrong[0].shape)}, not [vectors, width]")
    return {token: [r.float().reshape(-1, r.shape[-1]) for r in rows]}


def _check_shapes(weights: AdapterWeights, shapes: Mapping[str, tuple[int, int]], path: Path) -> None:
    """Compare every layer with the base's."""
    found = {layer: tuple(delta.shape) for layer, delta in weights.dense.items()}
    found |= {layer: (f.up.shape[0], f.down.flatten(1).shape[1]) for layer, f in weights.low_rank.items()}
    for layer, shape in found.items():
        if shape != shapes[layer]:
            raise DataError(
                f"{path}: {layer} is {shape}, the base has {shapes[layer]}; the file was made for another base"
            )


def _known(name: str, known: Mapping[str, str], path: Path, component: str = "unet") -> str:
    """Our layer of a client's name; PEFT folders name no component."""
    inner = name.removeprefix(keys.PEFT_ROOT)
    for candidate in (name, keys.portable(f"{component}.{inner}")):
        if candidate in known:
            return known[candidate]
    raise DataError(f"{path}: {name} names no layer of this base; the file was made for another one")


def component_of(metadata: Mapping[str, str], path: Path) -> str:
    """The component of a PEFT folder: stated in the file, or the folder's name, or the UNet."""
    folder = path.parent.name
    return metadata.get("litp.component") or (folder if folder in keys.COMPONENTS else "unet")


def _parse_lora(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], known: Mapping[str, str], path: Path
) -> dict[str, LowRank]:
    default = component_of(metadata, path)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.endswith(".alpha"):
            parts.setdefault(_known(key.removesuffix(".alpha"), known, path, default), {})["alpha"] = tensor
            continue
        match = LORA.match(key)
        if not match:
            raise DataError(f"{path}: key {key} is not part of a LoRA file{_kind_of(key)}")
        side = {"A": "down", "B": "up"}.get(match["ab"] or "", match["ud"] or match["k"])
        layer = _known(match["layer"], known, path, default)
        if tensor.ndim not in (2, 4) or (side == "up" and tensor[0, 0].numel() != 1):
            raise DataError(f"{path}: {key} has shape {tuple(tensor.shape)}; factors are [R, in] and [out, R]")
        parts.setdefault(layer, {})[side] = tensor.float().contiguous()
    settings = settings_of(metadata, path, default)
    found: dict[str, LowRank] = {}
    for layer, sides in parts.items():
        if missing := {"down", "up"} - set(sides):
            raise DataError(f"{path}: {layer} lacks its {missing.pop()} factor; the file is incomplete")
        rank = sides["down"].shape[0]
        if sides["up"].shape[1] != rank:
            raise DataError(f"{path}: {layer} has factors of ranks {rank} and {sides['up'].shape[1]}")
        alpha = float(sides["alpha"]) if "alpha" in sides else stated_alpha(settings, layer, rank)
        found[layer] = LowRank(sides["down"], sides["up"], alpha)
    return found


def _kind_of(key: str) -> str:
    """Name the kind of adapter that a foreign key belongs to."""
    kinds = {"hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT"}
    if "_custom_diffusion." in key:
        return "; `litp import` reads Custom Diffusion's weights of diffusers"
    return next((f"; {kind} files are not read" for part, kind in kinds.items() if part in key), "")


def settings_of(metadata: Mapping[str, str], path: Path, component: str) -> dict[str, Any]:
    """What the file, or the `adapter_config.json` beside it, says about ranks and alphas: `<component>.<option>`."""
    config = path.with_name("adapter_config.json")
    try:
        if path.name == "adapter_model.safetensors" and config.exists():
            return {f"{component}.{k}": v for k, v in json.loads(config.read_text(encoding="utf-8")).items()}
        return dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: its adapter configuration is not JSON: {error}") from error


def stated_alpha(settings: Mapping[str, Any], layer: str, rank: int) -> float:
    """Alpha of a layer as PEFT reads it: a pattern's, else the component's, else the rank."""
    component, path = keys.split(keys.portable(layer))
    alpha = settings.get(f"{component}.lora_alpha", rank)
    for pattern, value in (settings.get(f"{component}.alpha_pattern") or {}).items():
        if re.match(rf"(?:.*\.)?(?:{pattern})$", path):
            alpha = value
            break
    # Rank-stabilised scaling is alpha / √rank (Kalajdzievski, 2023, arXiv 2312.03732).
    return float(alpha) * (rank**0.5 if settings.get(f"{component}.use_rslora") else 1.0)
