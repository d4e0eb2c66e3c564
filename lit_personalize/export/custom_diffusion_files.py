"""Files of other Custom Diffusion programs as changes of a base (Kumari et al., 2022, arXiv 2212.04488).

They hold whole matrices W, of which ΔW = W - W0 is taken, or u·v = ΔW where they were compressed:

- `delta.bin`: {"unet": {"<path>.attn2.to_k.weight": W or {"u", "v"}}, "modifier_token": {"<new1>": row}}; on SDXL a
  token has a list of two rows; without a token, "text_encoder" may hold a whole state dict.
- `delta_epoch=*.ckpt`: {"state_dict": {"model.diffusion_model.<original block>...": W, "embed": rows}}.
- `pytorch_custom_diffusion_weights.bin` of diffusers: {"<path>.attn2.processor.to_k_custom_diffusion.weight": W}, with
  empty entries for self-attention; its tokens lie in a file each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lit_personalize.adapters.protocol import AdapterWeights, LowRank
from lit_personalize.adapters.shadow import all_parameters, weight_layers
from lit_personalize.backbones.base import Base
from lit_personalize.errors import DataError
from lit_personalize.export import keys

PORT = "_custom_diffusion."
ORIGINAL = "model.diffusion_model."
ENCODERS = ("text_encoder", "text_encoder_2")
DELTA = {"unet", "modifier_token", *ENCODERS}


def is_custom_diffusion(content: Mapping[str, Any]) -> bool:
    """Whether a file's content has one of the three layouts."""
    return isinstance(content.get("unet", content.get("state_dict")), Mapping) or any(PORT in k for k in content)


@dataclass
class _Parameter:
    name: str
    """In full: `unet.<path>.weight`."""
    layer: str
    """Its layer where it is the weight of one, else ""."""
    frozen: Tensor


def parse_custom_diffusion(content: Mapping[str, Any], base: Base, path: Path) -> AdapterWeights:
    """The changes that a file makes of this base.

    Raises:
        DataError: A key that names nothing of the base, a shape that does not fit, values that are no finite numbers,
            or weights that are all the base's own.
    """
    known = _parameters(base)
    weights = AdapterWeights()
    for name, value in _entries(content, base, path):
        if isinstance(value, Mapping) and not value:
            continue  # the port's word for a layer without weights
        if name not in known:
            raise DataError(f"{path}: {name} names nothing of base {base.source}; the file was made for another one")
        if isinstance(value, Mapping):
            _add_factors(weights, known[name], value, path)
        else:
            _add_whole(weights, known[name], _numbers(value, name, path), path)
    weights.tokens = _tokens(content, path)
    if not (weights.layers() or weights.parameters or weights.tokens):
        raise DataError(f"{path} changes nothing: its weights are those of base {base.source}")
    return weights


def largest_change(weights: AdapterWeights, base: Base) -> float:
    """The largest ‖ΔW‖ / ‖W0‖ of a layer; whole matrices of another base show as changes near 1."""
    known = _parameters(base)
    of_layer = {p.layer: p.frozen for p in known.values() if p.layer}
    shares = (weights.delta(n).norm() / of_layer[n].detach().float().cpu().norm() for n in weights.layers())
    return max((float(share) for share in shares), default=0.0)


def _parameters(base: Base) -> dict[str, _Parameter]:
    """Every parameter by the name that files have for it."""
    found = {}
    for component, module in base.components().items():
        layers = weight_layers(module)
        for path, (owner, attribute) in all_parameters(module).items():
            name, layer = f"{component}.{path}", path.removesuffix(".weight")
            own = layer if attribute == "weight" and layer in layers else ""
            frozen = cast(Tensor, owner._parameters[attribute])
            found[keys.portable(name)] = _Parameter(name, own and f"{component}.{own}", frozen)
    return found


def _entries(content: Mapping[str, Any], base: Base, path: Path) -> Iterator[tuple[str, Any]]:
    """Weights by our names, in any of the layouts."""
    if "unet" in content:
        if unknown := set(content) - DELTA:
            raise DataError(f"{path}: {min(unknown)!r} is no part of a delta file ({', '.join(sorted(DELTA))})")
        for component in ("unet", *ENCODERS):
            for name, value in _mapping(content.get(component, {}), component, path).items():
                if not name.endswith("position_ids"):
                    yield keys.portable(f"{component}.{name}"), value
    elif "state_dict" in content:
        stages = base.unet.config.layers_per_block
        layers = [f"unet.{p}" for p in weight_layers(base.unet)] if isinstance(stages, int) else []  # not one a block
        named = {alias: layer for layer in layers if (alias := keys.original(layer, stages))}
        for name, value in _mapping(content["state_dict"], "state_dict", path).items():
            if name != "embed":
                layer, _, part = name.removeprefix(ORIGINAL).rpartition(".")
                flat = f"lora_unet_{layer.replace('.', '_')}"  # of which kohya made its names
                yield (f"{named[flat]}.{part}" if name.startswith(ORIGINAL) and flat in named else name), value
    else:
        for name, value in content.items():
            if not isinstance(value, Mapping) or value:
                yield "unet." + name.replace(".processor.", ".").replace(PORT, "."), value


def _mapping(value: Any, name: str, path: Path) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise DataError(f"{path}: {name!r} holds no weights by name")
    return value


def _numbers(value: Any, name: str, path: Path) -> Tensor:
    """A tensor in fp32."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise DataError(f"{path}: {name} is no tensor of floating-point numbers")
    if not bool(torch.isfinite(value).all()):
        raise DataError(f"{path}: {name} holds NaN or infinite values")
    return value.detach().float().contiguous()


def _add_whole(weights: AdapterWeights, own: _Parameter, value: Tensor, path: Path) -> None:
    """W - W0, unless it is nothing but rounding to the precision of the file."""
    frozen = own.frozen.detach().cpu().float()
    if value.shape != frozen.shape:
        raise DataError(
            f"{path}: {own.name} is {tuple(value.shape)}, the base has {tuple(frozen.shape)}; "
            "the file was made for another base"
        )
    if any(torch.equal(value, frozen.to(dtype).float()) for dtype in (torch.float32, torch.float16, torch.bfloat16)):
        return
    if own.layer:
        weights.dense[own.layer] = (value - frozen).flatten(1)
    else:
        weights.parameters[own.name] = value - frozen


def _add_factors(weights: AdapterWeights, own: _Parameter, value: Mapping[str, Any], path: Path) -> None:
    """ΔW = u·v, u `[out, R]` and v `[R, in]`; the original tool writes R = 0 where one value outweighs its share."""
    if set(value) != {"u", "v"} or not own.layer:
        raise DataError(f"{path}: {own.name} holds {', '.join(map(str, value))}; compressed layers hold u and v")
    up, down = (_numbers(value[part], f"{own.name} ({part})", path) for part in ("u", "v"))
    shape = own.frozen.flatten(1).shape
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != len(down) or (up.shape[0], down.shape[1]) != tuple(shape):
        raise DataError(
            f"{path}: {own.name} is {tuple(up.shape)} times {tuple(down.shape)}, the base has {tuple(shape)}; "
            "the file was made for another base"
        )
    if len(down):
        weights.low_rank[own.layer] = LowRank(down, up, float(len(down))).shaped(own.frozen.shape)


def _tokens(content: Mapping[str, Any], path: Path) -> dict[str, list[Tensor]]:
    """Rows `[1, d]` of every token, one for each text encoder."""
    found: dict[str, list[Any]] = {}
    if "unet" in content:
        named = _mapping(content.get("modifier_token", {}), "modifier_token", path)
        found = {token: list(rows) if isinstance(rows, Sequence) else [rows] for token, rows in named.items()}
    elif "state_dict" in content and "embed" in content["state_dict"]:
        found = {f"<new{i + 1}>": [row] for i, row in enumerate(_rows(content["state_dict"]["embed"], path))}
    return {token: [_rows(row, path, token) for row in rows] for token, rows in found.items()}


def _rows(value: Any, path: Path, name: str = "embed") -> Tensor:
    """Rows `[n, d]`; a single one may be `[d]`."""
    rows = _numbers(value, name, path)
    if rows.ndim not in (1, 2):
        raise DataError(f"{path}: {name} has shape {tuple(rows.shape)}, not [rows, width]")
    return rows[None] if rows.ndim == 1 else rows
