"""Read adapter files into `AdapterWeights`, strictly: known keys, right shapes, finite values, no pickle."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_personalize.adapters.loaded import LoadedAdapter
from lit_personalize.adapters.protocol import AdapterWeights, LowRank
from lit_personalize.adapters.shadow import linear_layers
from lit_personalize.backbones.base import Base
from lit_personalize.errors import DataError
from lit_personalize.export import keys
from lit_personalize.export.files import FORMAT_VERSION

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
LORA = re.compile(
    r"^(?P<layer>.+?)\.(?:lora_(?P<ab>[AB])(?:\.\w+)?|lora\.(?P<ud>up|down)|lora_(?P<k>up|down))\.weight$"
)


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of one safetensors file.

    Raises:
        DataError: Missing, a pickle under any name, damaged, of a newer format, or with non-finite values.
    """
    if not path.is_file():
        raise DataError(f"adapter file {path} does not exist")
    head = path.read_bytes()[:16]
    # A safetensors file has its header's length in 8 bytes, which may look like a pickle's first, and then "{".
    pickled = head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[8:9] != b"{")
    if path.suffix.lower() in PICKLES or pickled:
        raise DataError(f"{path} is a pickle: loading one can run any code; convert it to .safetensors first")
    try:
        with safe_open(path, "pt") as stream:
            metadata = dict(stream.metadata() or {})
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a whole safetensors file: {error}") from error
    version = metadata.get("litp.format_version", FORMAT_VERSION)
    if not version.isdigit() or int(version) > int(FORMAT_VERSION):
        raise DataError(f"{path} has format version {version}, this program reads up to {FORMAT_VERSION}; upgrade it")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{path}: {name} holds NaN or infinite values")
    return tensors, metadata


def read_adapter(paths: Path | Iterable[Path], base: Base, force: bool = False) -> AdapterWeights:
    """Read one adapter from its file, its files, or a folder of them.

    Args:
        force: Accept a file that was made for another base, if shapes fit.

    Raises:
        DataError: See `read_file`; or a key that names no layer of the base, half a pair of factors, another base.
    """
    weights = AdapterWeights()
    for path in _expand(paths):
        tensors, metadata = read_file(path)
        made_for = metadata.get("litp.base_fingerprint", base.fingerprint)
        if made_for != base.fingerprint and not force:
            raise DataError(
                f"{path} was trained on base {metadata.get('litp.base', '?')} ({made_for}), this is {base.source} "
                f"({base.fingerprint}); give that base, or force it"
            )
        weights = weights.merge(parse(tensors, metadata, base, path))
    return weights


def load_adapter(paths: Path | Iterable[Path], base: Base, scale: float = 1.0, force: bool = False) -> LoadedAdapter:
    """Read and attach an adapter; it is active at once."""
    name = str(paths) if isinstance(paths, Path | str) else "+".join(Path(p).name for p in paths)
    adapter = LoadedAdapter(read_adapter(paths, base, force), name, scale)
    adapter.attach(base)
    return adapter


def _expand(paths: Path | Iterable[Path]) -> list[Path]:
    """Files of an adapter: of a folder, one LoRA file and every embedding."""
    if not isinstance(paths, Path | str):
        return [Path(p) for p in paths]
    path = Path(paths)
    if not path.is_dir():
        return [path]
    lora = [path / n for n in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors") if (path / n).exists()]
    found = [*lora[:1], *sorted(path.glob("learned_embeds*.safetensors"))]
    if not found:
        raise DataError(f"{path} holds no pytorch_lora_weights, adapter_model or learned_embeds .safetensors file")
    return found


def parse(tensors: dict[str, Tensor], metadata: dict[str, str], base: Base, path: Path) -> AdapterWeights:
    """Recognise the format by its keys."""
    if set(tensors) <= {"clip_l", "clip_g"} or "litp.token" in metadata:
        token = metadata.get("litp.token", f"<{path.stem}>")
        rows = [tensors[k] for k in ("clip_l", "clip_g") if k in tensors] or list(tensors.values())
        return AdapterWeights(tokens={token: [r.float().reshape(-1, r.shape[-1]) for r in rows]})
    if len(tensors) == 1 and next(iter(tensors.values())).ndim <= 2 and "lora" not in next(iter(tensors)):
        ((token, rows_),) = tensors.items()
        return AdapterWeights(tokens={token: [rows_.float().reshape(-1, rows_.shape[-1])]})
    parts = {c: module for c, module in base.components().items() if c != "vae"}
    names = [f"{c}.{p}" for c, module in parts.items() for p in linear_layers(module)]
    style = "kohya" if any(k.startswith("lora_") for k in tensors) else "portable"
    known = keys.index_by(names, len(base.text_encoders) == 2, style)
    if all(k.endswith(".delta") for k in tensors):
        return AdapterWeights(dense={_known(k.removesuffix(".delta"), known, path): t for k, t in tensors.items()})
    return AdapterWeights(low_rank=_parse_lora(tensors, metadata, known, path))


def _known(name: str, known: dict[str, str], path: Path) -> str:
    for candidate in (name, f"unet.{name.removeprefix('base_model.model.')}"):
        if candidate in known:
            return known[candidate]
    raise DataError(f"{path}: {name} names no layer of this base; the file was made for another one")


def _parse_lora(
    tensors: dict[str, Tensor], metadata: dict[str, str], known: dict[str, str], path: Path
) -> dict[str, LowRank]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.endswith(".alpha"):
            parts.setdefault(_known(key.removesuffix(".alpha"), known, path), {})["alpha"] = tensor
            continue
        match = LORA.match(key)
        if not match:
            raise DataError(f"{path}: key {key} is not part of a LoRA file")
        side = {"A": "down", "B": "up"}.get(match["ab"] or "", match["ud"] or match["k"])
        parts.setdefault(_known(match["layer"], known, path), {})[side] = tensor.float()
    alphas = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    config = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and config.exists():
        alphas = {f"unet.{k}": v for k, v in json.loads(config.read_text(encoding="utf-8")).items()}
    found: dict[str, LowRank] = {}
    for layer, sides in parts.items():
        if missing := {"down", "up"} - set(sides):
            raise DataError(f"{path}: {layer} lacks its {missing.pop()} factor; the file is incomplete")
        component, inner = keys.split(keys.portable(layer))
        rank = sides["down"].shape[0]
        pattern = alphas.get(f"{component}.alpha_pattern") or {}
        stated = pattern.get(inner.removeprefix("text_model."), alphas.get(f"{component}.lora_alpha", rank))
        alpha = float(sides["alpha"]) if "alpha" in sides else float(stated)
        if sides["up"].shape[1] != rank:
            raise DataError(f"{path}: {layer} has factors of ranks {rank} and {sides['up'].shape[1]}")
        found[layer] = LowRank(sides["down"], sides["up"], alpha)
    return found
