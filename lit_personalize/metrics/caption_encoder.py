"""Captions, and query pictures, as unit vectors of a local CLIP: what retrieval compares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lit_personalize.backbones.fingerprint import fingerprint_of
from lit_personalize.errors import DataError
from lit_personalize.metrics.features import Clip, projected


class CaptionEncoder:
    """The projected text embedding of a `CLIPModel` directory (`text_embeds`; Radford et al., 2021, sec. 2.3).

    Captions are padded to the longest of a batch and not to 77 tokens: attention is causal and the end token is read,
    so padding behind it changes nothing but the time. Captions longer than the model's positions are cut.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        self.clip = Clip(path, device=device)
        self.clip.model.to(dtype)
        self.dtype = dtype
        self._fingerprint = f"text_embeds {fingerprint_of(Path(path))} {str(dtype).removeprefix('torch.')}"

    @property
    def fingerprint(self) -> str:
        """Names the weights, the pooling and the precision."""
        return self._fingerprint

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Ids and mask, int64 `[N, S]`."""
        encoded = self.clip.tokenizer(list(captions), padding="longest", truncation=True, return_tensors="pt")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    @torch.inference_mode()
    def embed(self, tokens: dict[str, Tensor]) -> np.ndarray:
        """fp32 `[N, d]`, each row of length 1."""
        inputs = {name: tensor.to(self.clip.model.device) for name, tensor in tokens.items()}
        return _unit(projected(self.clip.model.get_text_features(**inputs)))

    def texts(self, captions: Sequence[str]) -> np.ndarray:
        """fp32 `[N, d]`, each row of length 1."""
        return self.embed(self.tokenize(captions))

    @torch.inference_mode()
    def image(self, path: str | Path) -> np.ndarray:
        """fp32 `[1, d]` of a picture; its cosine with captions is on a lower scale than that of a text.

        Raises:
            DataError: The file is no picture.
        """
        try:
            with Image.open(path) as image:
                pixels = self.clip.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"cannot read picture {path}: {error}") from error
        inputs = pixels.to(self.clip.model.device, self.dtype)
        return _unit(projected(self.clip.model.get_image_features(pixel_values=inputs)))


def _unit(features: Any) -> np.ndarray:
    return nn.functional.normalize(features.float(), dim=-1).cpu().numpy()
