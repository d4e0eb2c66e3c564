"""A merged pipeline: W0 + ΔW and added tokens written into a stock diffusers directory.

Scheduler, flags and every part that adapters do not change are the base's own.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lit_personalize import atomic
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import PICKLES, config_directory, index_of
from lit_personalize.backbones.token_rows import row_names
from lit_personalize.export import keys
from lit_personalize.export.stock import side_of, stock_pipeline

log = logging.getLogger(__name__)
WRITTEN = ("unet", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


@torch.no_grad()
def merged_pipeline(weights: AdapterWeights, base: Base) -> Any:
    """A stock pipeline with the changes in its own weights; the base is not touched."""
    pipe = stock_pipeline(base)
    for layer in weights.layers():
        component, path = keys.split(layer)
        weight = pipe.components[component].get_submodule(path).weight
        weight.add_(weights.delta(layer).reshape(weight.shape))
    for name, change in weights.parameters.items():
        component, path = keys.split(name)
        pipe.components[component].get_parameter(path).add_(change)
    for token, rows in weights.tokens.items():
        names = row_names(token, len(rows[0]))
        for i, new in enumerate(rows):
            tokenizer, encoder = side_of(pipe, i)
            tokenizer.add_tokens(names)
            if len(tokenizer) > encoder.get_input_embeddings().num_embeddings:
                encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            ids = tokenizer.convert_tokens_to_ids(names)
            encoder.get_input_embeddings().weight[ids] = new.to(encoder.dtype)
    for i in range(len(base.text_encoders)):
        tokenizer, encoder = side_of(pipe, i)
        encoder.config.eos_token_id = tokenizer.eos_token_id  # pooled states come from where they came in training
    return pipe


def write_pipeline(weights: AdapterWeights, base: Base, folder: Path) -> Path:
    """Write a pipeline that `from_pretrained` loads without any adapter file; an earlier one is replaced whole.

    Raises:
        OSError: The disk is full, or closed to this user; its `filename` is `folder`.
    """
    temporary, old = (folder.with_name(f".{what}-{os.getpid()}-{folder.name}") for what in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        merged_pipeline(weights, base).save_pretrained(temporary)
        _take_from_base(config_directory(base.source, base.config), temporary)
        _take_schedule(base, temporary)
        for file in temporary.rglob("*"):
            atomic.flush(file)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        atomic.flush(folder.parent)
    except SafetensorError as error:  # its name for any failure of the disk
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
        raise
    except OSError as error:
        error.filename = str(folder)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
    return folder


def _take_from_base(own: Path, folder: Path) -> None:
    """Put the base's scheduler, flags and other parts (safety checker, ...) into a pipeline that was just written."""
    index, written = index_of(own), index_of(folder)
    for part, kind in index.items():
        if part in WRITTEN or not isinstance(kind, list) or kind[0] is None:
            continue
        index[part] = kind if _copy_part(own / part, folder / part) else [None, None]
    kept = {key: value for key, value in written.items() if key in WRITTEN or key == "_diffusers_version"}
    (folder / "model_index.json").write_text(json.dumps({**index, **kept}, indent=2) + "\n", encoding="utf-8")


def _take_schedule(base: Base, folder: Path) -> None:
    """Put the schedule of training into a pipeline, if that was rescaled: the base's would draw too little contrast."""
    from diffusers import DDIMScheduler

    own = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    if not base.zero_terminal_snr or own.get("rescale_betas_zero_snr"):
        return
    changed = {"clip_sample": False, "set_alpha_to_one": False}
    shutil.rmtree(folder / "scheduler")
    DDIMScheduler.from_config(base.scheduler.config, **changed).save_pretrained(folder / "scheduler")
    index = {**index_of(folder), "scheduler": ["diffusers", "DDIMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_part(source: Path, target: Path) -> bool:
    """Copy a part without its pickles; False where nothing can be copied, or nothing but pickles holds its weights."""
    names = [p.name for p in source.iterdir()] if source.is_dir() else []
    pickles = [name for name in names if name.endswith(PICKLES)]
    if not names or (pickles and not any(name.endswith(".safetensors") for name in names)):
        log.warning("%s is left out of the merged pipeline: it is missing, or only a pickle", source)
        return False
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.py", *(f"*{ending}" for ending in PICKLES)))
    return True
