"""Load a base from a local diffusers directory or a single-file checkpoint; nothing is ever fetched."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lit_personalize.backbones.base import Base, StableDiffusion, StableDiffusionXL
from lit_personalize.backbones.fingerprint import fingerprint_of
from lit_personalize.errors import DataError, UsageError

TINYWORLD = "tinyworld"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
"""Endings of files that may run code when they are loaded; `litp import` alone reads weights out of them."""
PART_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
"""That a `model_index.json` may name; the last is diffusers' own module of the safety checker."""
TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def tinyworld_directory() -> Path:
    """The embedded base, a stock diffusers directory inside the package."""
    return Path(__file__).parents[1] / "tinyworld" / "weights" / "base"


def resolve(base: str | Path) -> Path:
    """The local directory or file that `base` names ("tinyworld" is the embedded one).

    Raises:
        DataError: Nothing is there.
    """
    path = tinyworld_directory() if str(base) == TINYWORLD else Path(base).expanduser()
    if not path.exists():
        raise DataError(
            f"base {str(base)!r} not found at {path.absolute()}; give a local diffusers directory, "
            f"a .safetensors checkpoint, or {TINYWORLD!r}"
        )
    return path


def load_base(
    base: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    vae_dtype: str | torch.dtype | None = None,
    config: str | Path | None = None,
    device: str | torch.device = "cpu",
    zero_terminal_snr: bool = False,
    weights: bool = True,
) -> Base:
    """Load a base with frozen weights.

    Args:
        base: A diffusers directory, a single-file checkpoint, or "tinyworld".
        dtype: Of UNet and text encoders.
        vae_dtype: Of the VAE; by default fp32 for SDXL in fp16 (its VAE overflows there), else `dtype`.
        config: For a single file: a diffusers directory of the same family that gives configs and
            tokenizers, so that nothing is fetched.
        zero_terminal_snr: See `Base.use_zero_terminal_snr`.
        weights: False builds the modules on the meta device from their configs alone, to count and to plan with: no
            weights are read, and there need not be any; the fingerprint is empty.

    Raises:
        DataError: A part is missing or damaged; the message names it.
        UsageError: The directory holds another kind of pipeline, or one that cannot have zero terminal SNR.
    """
    path = resolve(base)
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    family = StableDiffusionXL if _is_xl(index_of(config_directory(base, config))) else StableDiffusion
    if vae_dtype is None:
        vae_dtype = torch.float32 if family is StableDiffusionXL and dtype == torch.float16 else dtype
    vae_dtype = DTYPES[vae_dtype] if isinstance(vae_dtype, str) else vae_dtype
    if weights:
        parts = parts_of(base, config, dtype, vae_dtype)
    else:
        parts = _parts_of_directory(config_directory(base, config), dtype, vae_dtype, _build_part)
    fingerprint = fingerprint_of(path) if weights else ""
    built = family(**parts, fingerprint=fingerprint, source=str(base), config=config)
    if zero_terminal_snr:
        built.use_zero_terminal_snr()
    return built.to(device) if weights else built


def parts_of(
    base: str | Path,
    config: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Stock modules of a base by part: unet, vae, text_encoders, tokenizers, scheduler; and the pipeline's flag
    `force_zeros_for_empty_prompt`.
    """
    path, folder = resolve(base), config_directory(base, config)
    if path.is_dir():
        return _parts_of_directory(path, dtype, vae_dtype or dtype)
    return _parts_of_file(path, folder, dtype, vae_dtype or dtype)


def config_directory(base: str | Path, config: str | Path | None = None) -> Path:
    """The diffusers directory that a base's configs come from: its own, or for a single file the one named for it.

    Raises:
        DataError: The file is no safetensors file.
        UsageError: A single file, and `config` names no directory.
    """
    path = resolve(base)
    if path.is_dir():
        return path
    if path.suffix != ".safetensors":
        raise DataError(f"{path.name}: only .safetensors checkpoints are read; {path.suffix or 'this'} may run code")
    if config is None:
        raise UsageError(
            f"{path.name} is a single file: name a diffusers directory of the same family in `base_config` "
            "for its configs and tokenizers (nothing is fetched from a hub)"
        )
    return resolve(config)


def index_of(path: Path) -> dict[str, Any]:
    """The `model_index.json` of a diffusers directory: its pipeline class, parts and flags.

    Raises:
        DataError: There is none, or it is no JSON object.
    """
    index = path / "model_index.json"
    if not index.exists():
        raise DataError(f"{path} has no model_index.json: it is not a diffusers pipeline directory")
    try:
        return dict(json.loads(index.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{index} is damaged ({error}); copy the diffusers directory again") from error


def check_parts(path: Path) -> dict[str, Any]:
    """The `model_index.json` of a directory whose parts are classes of diffusers and transformers, and none of its own.

    Raises:
        DataError: See `index_of`, or a part would be loaded by code that lies in the directory or somewhere else.
    """
    index = index_of(path)
    parts: dict[str, Any] = {name: kind for name, kind in index.items() if isinstance(kind, list)}
    if not isinstance(index.get("_class_name"), str):
        parts["_class_name"] = index.get("_class_name")
    for name, kind in parts.items():
        library, made = kind if isinstance(kind, list) and len(kind) == 2 else (kind, None)
        if not (library in PART_LIBRARIES and isinstance(made, str) or library is None and not isinstance(made, str)):
            raise DataError(
                f"{path / 'model_index.json'} has {name} made by {kind}; only classes of diffusers and transformers "
                "are loaded, and no code of a directory's own: save the pipeline again without it"
            )
    return index


def _is_xl(index: Mapping[str, Any]) -> bool:
    return "XL" in index.get("_class_name", "")


def _parts_of_directory(
    path: Path, dtype: torch.dtype, vae_dtype: torch.dtype, part: Callable[..., nn.Module] | None = None
) -> dict[str, Any]:
    part = part or _load_part
    listed = check_parts(path)
    wanted = ["unet", "vae", "text_encoder", "tokenizer", "scheduler"]
    if _is_xl(listed):
        wanted += ["text_encoder_2", "tokenizer_2"]
    elif "StableDiffusion" not in listed.get("_class_name", ""):
        raise UsageError(f"{path} is a {listed.get('_class_name')}; supported are Stable Diffusion 1, 2 and XL")
    if missing := [part for part in wanted if not (path / part).is_dir()]:
        raise DataError(f"base {path} lacks {', '.join(missing)}: copy the complete diffusers directory")
    encoders = [name for name in ("text_encoder", "text_encoder_2") if name in wanted]
    return {
        "unet": part(path, "unet", dtype),
        "vae": part(path, "vae", vae_dtype),
        "text_encoders": [part(path, name, dtype, listed[name][1]) for name in encoders],
        "tokenizers": [_load_tokenizer(path, n) for n in ("tokenizer", "tokenizer_2") if n in wanted],
        "scheduler": _load_scheduler(path),
        "force_zeros_for_empty_prompt": _forces_zeros(listed),
    }


def _forces_zeros(index: Mapping[str, Any]) -> bool:
    """Whether an empty negative prompt means zeros: SDXL's pipeline says so where its index does not."""
    return _is_xl(index) and bool(index.get("force_zeros_for_empty_prompt", True))


def _class_of(path: Path, name: str, class_name: str) -> Any:
    import transformers
    from diffusers import AutoencoderKL, UNet2DConditionModel

    if class_name not in TEXT_ENCODERS:
        raise DataError(f"base {path}: {name} is a {class_name}; supported are {' and '.join(TEXT_ENCODERS)}")
    return {"unet": UNet2DConditionModel, "vae": AutoencoderKL}.get(name) or getattr(transformers, class_name)


def _build_part(path: Path, name: str, dtype: torch.dtype, class_name: str = "CLIPTextModel") -> nn.Module:
    """A part by its config, without weights, on the meta device."""
    kind = _class_of(path, name, class_name)
    try:
        with torch.device("meta"):
            if name in ("unet", "vae"):
                return cast(nn.Module, kind.from_config(kind.load_config(path / name, local_files_only=True)).to(dtype))
            config = kind.config_class.from_pretrained(path / name, local_files_only=True)
            return cast(nn.Module, kind(config).to(dtype))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"base {path}: cannot read the config of {name}: {error}") from error


def _load_part(path: Path, name: str, dtype: torch.dtype, class_name: str = "CLIPTextModel") -> nn.Module:
    kind = _class_of(path, name, class_name)
    keyword = "torch_dtype" if name in ("unet", "vae") else "dtype"
    files = sorted((path / name).iterdir())
    weights = [p.name for p in files if p.suffix == ".safetensors"]
    if not weights:
        if pickled := [p.name for p in files if p.suffix in PICKLES]:
            raise DataError(
                f"base {path}: {name}/{pickled[0]} is a pickle, which may run code, so it is not read; where you trust "
                f"the file, convert it: DiffusionPipeline.from_pretrained({str(path)!r})"
                ".save_pretrained(NEW, safe_serialization=True)"
            )
        raise DataError(f"base {path}: {name} has a config but no weights (*.safetensors)")
    options = {
        "local_files_only": True, "use_safetensors": True, keyword: dtype,
        "variant": "fp16" if all(".fp16." in file for file in weights) else None,
    }  # fmt: skip
    try:
        return kind.from_pretrained(path / name, **options)
    except Exception as error:  # noqa: BLE001 - loaders raise a dozen types; all mean: this part does not load
        raise DataError(f"base {path}: cannot load {name}: {error}") from error


def _load_tokenizer(path: Path, name: str) -> Any:
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(path / name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"base {path}: cannot load {name}: {error}") from error


def _load_scheduler(path: Path) -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_pretrained(path / "scheduler", local_files_only=True)


def _parts_of_file(path: Path, folder: Path, dtype: torch.dtype, vae_dtype: torch.dtype) -> dict[str, Any]:
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    index = check_parts(folder)
    kind = StableDiffusionXLPipeline if _is_xl(index) else StableDiffusionPipeline
    options: dict[str, Any] = {"config": str(folder), "local_files_only": True}
    try:
        pipe = kind.from_single_file(path, torch_dtype=dtype, **options)
        vae = pipe.vae
        if vae_dtype != dtype:  # from the file again: what was rounded to `dtype` stays rounded
            vae = AutoencoderKL.from_single_file(path, torch_dtype=vae_dtype, subfolder="vae", **options)
    except Exception as error:  # noqa: BLE001 - see _load_part
        raise DataError(f"cannot read {path.name} as a {kind.__name__}: {error}") from error
    two = kind is StableDiffusionXLPipeline
    return {
        "unet": pipe.unet,
        "vae": vae,
        "text_encoders": [pipe.text_encoder, pipe.text_encoder_2] if two else [pipe.text_encoder],
        "tokenizers": [pipe.tokenizer, pipe.tokenizer_2] if two else [pipe.tokenizer],
        "scheduler": DDPMScheduler.from_config(pipe.scheduler.config),
        "force_zeros_for_empty_prompt": _forces_zeros(index),
    }
