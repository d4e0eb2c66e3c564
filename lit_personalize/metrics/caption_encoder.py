"""Captions, and query pictures, as unit vectors of a local CLIP: what retrieval compares."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lit_personalize.backbones.fingerprint import fingerprint_of
from lit_personalize.errors import DataError, UsageError
from lit_personalize.metrics.features import Clip, directory, load_local, projected


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
        return _tokenized(self.clip.tokenizer, captions)

    @torch.inference_mode()
    def embed(self, tokens: dict[str, Tensor]) -> np.ndarray:
        """fp32 `[N, d]`, each row of length 1."""
        inputs = {name: tensor.to(self.clip.model.device) for name, tensor in tokens.items()}
        return _unit(projected(self.clip.model.get_text_features(**inputs)))

    def texts(self, captions: Sequence[str]) -> np.ndarray:
        """fp32 `[N, d]`, each row of length 1."""
        return self.embed(self.tokenize(captions))

    @torch.inference_mode()
    def image(self, *paths: str | Path) -> np.ndarray:
        """fp32 `[1, d]` of a picture; its cosine with captions is on a lower scale than that of a text.

        Several pictures ask together, by the mean of their unit vectors: what they share stays, what only one of them
        shows fades.

        Raises:
            DataError: A file is no picture.
        """
        return _unit(torch.from_numpy(np.concatenate([self._picture(path) for path in paths]).mean(0, keepdims=True)))

    def _picture(self, path: str | Path) -> np.ndarray:
        try:
            with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
                pixels = self.clip.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"cannot read picture {path}: {error}") from error
        inputs = pixels.to(self.clip.model.device, self.dtype)
        return _unit(projected(self.clip.model.get_image_features(pixel_values=inputs)))


class PooledEncoder:
    """The pooled state of a bare `CLIPTextModel`, such as a pipeline's text encoder, for want of a whole CLIP.

    It was not trained to be compared: cosines are on a narrower scale than those of `CaptionEncoder`, and pictures
    have none.

    Args:
        path: Directory of the text model; the tokenizer lies in it or, as in a pipeline, beside it.

    Raises:
        DataError: No text model or no tokenizer is there.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        from transformers import CLIPTextModel, CLIPTokenizer

        folder = directory(path, "text encoder")
        if json.loads((folder / "config.json").read_text()).get("model_type") != "clip_text_model":
            raise DataError(f"{folder} is no bare text encoder; give a whole CLIP as --clip")
        self.model = load_local(CLIPTextModel, folder, dtype=dtype).eval().to(device)
        beside = folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
        inside = (folder / "tokenizer_config.json").is_file()
        words = folder if inside else directory(beside, "tokenizer", "tokenizer_config")
        self.tokenizer = load_local(CLIPTokenizer, words)
        self._fingerprint = f"pooler_output {fingerprint_of(folder)} {str(dtype).removeprefix('torch.')}"

    @property
    def fingerprint(self) -> str:
        """Names the weights, the pooling and the precision."""
        return self._fingerprint

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Ids and mask, int64 `[N, S]`."""
        return _tokenized(self.tokenizer, captions)

    @torch.inference_mode()
    def embed(self, tokens: dict[str, Tensor]) -> np.ndarray:
        """fp32 `[N, d]`, each row of length 1."""
        inputs = {name: tensor.to(self.model.device) for name, tensor in tokens.items()}
        return _unit(self.model(**inputs).pooler_output)

    def texts(self, captions: Sequence[str]) -> np.ndarray:
        """fp32 `[N, d]`, each row of length 1."""
        return self.embed(self.tokenize(captions))

    def image(self, *paths: str | Path) -> np.ndarray:
        """Refuse: pictures need the other half of a CLIP.

        Raises:
            UsageError: Always.
        """
        raise UsageError(f"a text encoder alone cannot embed the picture {paths[0]}; give a whole CLIP as --clip")


def _tokenized(tokenizer: Any, captions: Sequence[str]) -> dict[str, Tensor]:
    encoded = tokenizer(list(captions), padding="longest", truncation=True, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _unit(features: Any) -> np.ndarray:
    return nn.functional.normalize(features.float(), dim=-1).cpu().numpy()
