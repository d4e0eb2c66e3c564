"""One picture drawn twice from the same noise: by the stock pipeline, and by the trainer's sampler."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from lit_personalize.adapters.loaded import LoadedAdapter
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.backbones.token_rows import pieces_of
from lit_personalize.errors import VerificationError
from lit_personalize.export.exporter import Exported
from lit_personalize.export.loading import load_adapter, read_adapter
from lit_personalize.export.stock import comparison_scheduler, side_of, stock_pipeline
from lit_personalize.sampling.sampler import SamplingOptions, generate, start_noise

log = logging.getLogger(__name__)

PICTURE_TOLERANCE = 1 / 255
STEPS = 4
GUIDANCE = 3.0


def place_embedding(pipe: Any, item: Exported, token: str, rows: Sequence[Tensor]) -> None:
    """Load an embedding as a user would: the file itself for one encoder, `clip_l` and `clip_g` by name for two.

    Of a token of several pieces, such as <s0><s1>, each piece becomes the name of a row.
    """
    if item.encoder is not None:
        tokenizer, encoder = side_of(pipe, item.encoder)
        pipe.load_textual_inversion(
            item.path.parent, weight_name=item.path.name, text_encoder=encoder, tokenizer=tokenizer
        )
    elif len(rows) == 1 and not pieces_of(token):
        pipe.load_textual_inversion(item.path.parent, weight_name=item.path.name, token=token)
    else:
        state = load_file(item.path)
        for i, key in enumerate(("clip_l", "clip_g") if len(rows) == 2 else (token,)):
            tokenizer, encoder = side_of(pipe, i)
            value, name = (state[key], pieces) if (pieces := pieces_of(token)) else ({token: state[key]}, token)
            pipe.load_textual_inversion(value, token=name, text_encoder=encoder, tokenizer=tokenizer)


def compare_pictures(files: Sequence[Exported], base: Base, prompt: str) -> float | None:
    """Largest difference of a pixel in [0, 1] with the adapter files in both; None if no file can be drawn with.

    The diffusers file is drawn where there is one, else the kohya file; embeddings always.

    Raises:
        VerificationError: It is more than one step of 8 bits.
    """
    loras = sorted((f for f in files if f.kind in ("diffusers", "kohya")), key=lambda f: f.kind)
    embeddings = [f for f in files if f.kind == "embedding" and f.encoder is None]
    chosen = [*loras[:1], *embeddings]
    if not chosen:
        return None
    pipe = stock_pipeline(base)
    for lora in loras[:1]:
        pipe.load_lora_weights(lora.path.parent, weight_name=lora.path.name)
    for item in embeddings:
        ((token, rows),) = read_adapter(item.path, base, force=True).tokens.items()
        place_embedding(pipe, item, token, rows)
    fresh = load_base(base.source, config=base.config, zero_terminal_snr=base.zero_terminal_snr)
    adapter = load_adapter([f.path for f in chosen], fresh, force=True)
    pipe.scheduler = comparison_scheduler(fresh.scheduler)  # files may ask for another schedule
    return _compare_on(base.device, pipe, fresh, adapter, prompt, "the stock pipeline")


def compare_merged(pipe: Any, base: Base, weights: AdapterWeights, prompt: str, path: Path) -> float:
    """Likewise for a merged pipeline, against the adapter on the untouched base."""
    fresh = load_base(base.source, config=base.config, zero_terminal_snr=base.zero_terminal_snr)
    adapter = LoadedAdapter(weights)
    adapter.attach(fresh)
    return _compare_on(base.device, pipe, fresh, adapter, prompt, str(path))


def _compare_on(device: torch.device, pipe: Any, base: Base, adapter: LoadedAdapter, prompt: str, what: str) -> float:
    """Compare on a device; where two models do not fit into its memory, on the CPU."""
    try:
        pipe.to(device)
        base.to(device)
        # TF32 rounds the two ways of adding ΔW apart by more than the tolerance.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return _compare(pipe, base, adapter, prompt, what)
    except torch.OutOfMemoryError:
        log.warning("%s has no room for two models: the picture is compared on the CPU", device)
    pipe.to("cpu")
    base.to("cpu")
    return _compare(pipe, base, adapter, prompt, what)


def _compare(pipe: Any, base: Base, adapter: LoadedAdapter, prompt: str, what: str) -> float:
    options = SamplingOptions(steps=STEPS, guidance=GUIDANCE)
    ours = generate(base, [prompt], [0], [adapter], options)[0] / 255.0
    stock = pipe(
        prompt, num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=base.resolution,
        width=base.resolution, latents=start_noise(base, [0]), output_type="np",
    ).images[0]  # fmt: skip
    difference = float(np.abs(np.round(stock * 255) / 255 - ours).max())
    if not difference <= PICTURE_TOLERANCE + 1e-6:
        raise VerificationError(f"{what} draws another picture: pixels differ by up to {difference:.4f}")
    return difference
