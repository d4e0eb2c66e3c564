"""Which files of a model directory are opened, and which are not there; models of a hub, only when asked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lit_personalize.errors import DataError
from lit_personalize.tensor_files import read_header

HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
SETTINGS = ("*.json", "*.txt", "*.model")
PIPELINE_PATTERNS = [
    "model_index.json", "scheduler/*",
    *(f"{part}/{pattern}" for part in (*PARTS, *TOKENIZERS) for pattern in (*SETTINGS, "*.safetensors")),
]  # fmt: skip
"""Of a Stable Diffusion repository: no pickles, no Flax, no ONNX, no safety checker, no whole checkpoints beside it."""
MODEL_PATTERNS = [*SETTINGS, "*.safetensors"]
"""Of a CLIP or ViT repository."""
VARIANTS = ["*.fp16.*", "*.bf16.*", "*non_ema*", "*.fp16-*"]
"""Further copies of the same weights, which are not fetched."""


def snapshot(repository: str, pipeline: bool, fetch: bool, cache: Path | None = None) -> Path:
    """The local copy of a hub's repository, as `huggingface_hub` keeps it.

    Args:
        pipeline: It is a diffusers pipeline; else one transformers model.
        fetch: Ask the hub for what is not here; otherwise only the cache is looked at, and no network is used.
        cache: Folder that the copy is kept in; None takes that of `huggingface_hub` (`HF_HOME`).

    Raises:
        DataError: It is not here, or could not be fetched.
    """
    from huggingface_hub import snapshot_download

    patterns = PIPELINE_PATTERNS if pipeline else MODEL_PATTERNS
    try:
        kept = snapshot_download(
            repository, cache_dir=cache, local_files_only=not fetch, allow_patterns=patterns, ignore_patterns=VARIANTS
        )
    except Exception as error:  # noqa: BLE001 - the hub's client raises a dozen types; all mean: it is not here
        if not fetch:
            raise DataError(f"{repository} is not in the local cache of the hub") from error
        said = str(error).strip().splitlines()
        raise DataError(f"{repository} could not be fetched: {said[0] if said else type(error).__name__}") from error
    return Path(kept)


def pipeline_files(folder: Path, weights: bool = True) -> tuple[list[Path], list[str]]:
    """Files of a diffusers directory that training, sampling and exporting open, and what is wrong with it.

    Every safetensors file counts, since the base's fingerprint does: a copy of some would be another base.

    Args:
        weights: Also those; a single-file base takes configs and tokenizers alone from such a directory.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        return [], [f"{folder} has no model_index.json: it is not a diffusers pipeline directory"]
    try:
        listed: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
        two = "XL" in str(listed.get("_class_name", ""))
    except (ValueError, AttributeError) as error:
        return [], [f"{index} is damaged: {error}"]
    wrong: list[str] = []
    for part in PARTS if two else PARTS[:3]:
        wrong += _missing(folder, part, ["config.json"])
        if weights:
            wrong += _weights(folder / part, folder)
    for name in TOKENIZERS if two else TOKENIZERS[:1]:
        wrong += _tokenizer(folder / name, folder)
    wrong += _missing(folder, "scheduler", ["scheduler_config.json"])
    patterns = (*SETTINGS, "*.safetensors") if weights else SETTINGS
    return sorted({p for pattern in patterns for p in folder.rglob(pattern) if _is_shown(p, folder)}), wrong


def model_files(folder: Path, text: bool) -> tuple[list[Path], list[str]]:
    """Files of a transformers directory that measures pictures, and what is wrong with it.

    Args:
        text: It also reads captions: a CLIP.
    """
    wrong = [f"{folder} has no {name}" for name in ("config.json", "preprocessor_config.json")
             if not (folder / name).is_file()]  # fmt: skip
    wrong += _weights(folder, folder.parent)
    if text:
        wrong += _tokenizer(folder, folder.parent)
    return sorted(p for pattern in (*SETTINGS, "*.safetensors") for p in folder.glob(pattern)), wrong


def _is_shown(path: Path, folder: Path) -> bool:
    return path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)


def _missing(folder: Path, part: str, names: list[str]) -> list[str]:
    return [f"{folder} has no {part}/{name}" for name in names if not (folder / part / name).is_file()]


def _weights(part: Path, folder: Path) -> list[str]:
    """Whether a part's weights are there and whole, those of several files also all of them."""
    files = sorted(part.glob("*.safetensors"))
    if not files:
        return [f"{folder} has no {part.name}/*.safetensors"]
    wrong = []
    for path in files:
        try:
            read_header(path)
        except DataError as error:
            wrong.append(str(error))
    for index in part.glob("*.safetensors.index.json"):
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            wrong += [f"{index} names {name}, which is not there" for name in sorted(named)
                      if not (part / str(name)).is_file()]  # fmt: skip
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            wrong.append(f"{index} is damaged: {error!r}")
    return wrong


def _tokenizer(part: Path, folder: Path) -> list[str]:
    whole = (part / "tokenizer.json").is_file() or all((part / n).is_file() for n in ("vocab.json", "merges.txt"))
    return [] if whole else [f"{folder} has no tokenizer in {part.name} (vocab.json and merges.txt, or tokenizer.json)"]
