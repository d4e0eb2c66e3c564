"""A merged pipeline: W0 + ΔW and added tokens written into a stock diffusers directory."""

from __future__ import annotations

from pathlib import Path

import torch

from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.backbones.base import Base
from lit_personalize.export import keys
from lit_personalize.export.stock import stock_pipeline


@torch.no_grad()
def write_pipeline(weights: AdapterWeights, base: Base, folder: Path) -> Path:
    """Write a pipeline that `from_pretrained` loads without any adapter file."""
    pipe = stock_pipeline(base)
    for layer, delta in weights.deltas().items():
        component, path = keys.split(layer)
        pipe.components[component].get_submodule(path).weight.add_(delta)
    for token, rows in weights.tokens.items():
        names = [token, *(f"{token}_{i}" for i in range(1, len(rows[0])))]
        for i, new in enumerate(rows):
            suffix = "" if i == 0 else f"_{i + 1}"
            tokenizer, encoder = pipe.components[f"tokenizer{suffix}"], pipe.components[f"text_encoder{suffix}"]
            tokenizer.add_tokens(names)
            encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            ids = tokenizer.convert_tokens_to_ids(names)
            encoder.get_input_embeddings().weight[ids] = new.to(encoder.dtype)
            encoder.config.eos_token_id = tokenizer.eos_token_id
    pipe.save_pretrained(folder)
    return folder
