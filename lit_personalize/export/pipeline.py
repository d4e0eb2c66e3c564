"""A merged pipeline: W0 + ΔW and added tokens written into a stock diffusers directory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from lit_personalize import atomic
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.backbones.base import Base
from lit_personalize.export import keys
from lit_personalize.export.stock import side_of, stock_pipeline


@torch.no_grad()
def merged_pipeline(weights: AdapterWeights, base: Base) -> Any:
    """A stock pipeline with the changes in its own weights; the base is not touched."""
    pipe = stock_pipeline(base)
    for layer in weights.layers():
        component, path = keys.split(layer)
        weight = pipe.components[component].get_submodule(path).weight
        weight.add_(weights.delta(layer).reshape(weight.shape))
    for token, rows in weights.tokens.items():
        names = [token, *(f"{token}_{i}" for i in range(1, len(rows[0])))]
        for i, new in enumerate(rows):
            tokenizer, encoder = side_of(pipe, i)
            tokenizer.add_tokens(names)
            if len(tokenizer) > encoder.get_input_embeddings().num_embeddings:
                encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            ids = tokenizer.convert_tokens_to_ids(names)
            encoder.get_input_embeddings().weight[ids] = new.to(encoder.dtype)
            encoder.config.eos_token_id = tokenizer.eos_token_id
    return pipe


def write_pipeline(weights: AdapterWeights, base: Base, folder: Path) -> Path:
    """Write a pipeline that `from_pretrained` loads without any adapter file; an earlier one is replaced whole."""
    temporary, old = (folder.with_name(f".{what}-{os.getpid()}-{folder.name}") for what in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        merged_pipeline(weights, base).save_pretrained(temporary)
        for file in temporary.rglob("*"):
            atomic.flush(file)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        atomic.flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
    return folder
