"""Feature extractors from local directories: uint8 pictures `[N, H, W, 3]` to fp32 features `[N, d]`.

Every metric is a function of such matrices. Nothing is fetched: a missing directory is an error that
names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_personalize.backbones.loading import PICKLES
from lit_personalize.errors import DataError, UsageError

AS_SAFETENSORS = "where you trust it, load it once in transformers and save_pretrained it as .safetensors"


def clip_directory(path: str | Path | None, base: str) -> Path:
    """The CLIP that judges pictures of `base`: the one that is named, or on tinyworld the embedded one.

    Raises:
        UsageError: None is named, and the base is another.
    """
    if path:
        return Path(path)
    if base == "tinyworld":
        from lit_personalize.tinyworld.build import committed_weights

        return committed_weights() / "clip"
    raise UsageError(
        "no CLIP to judge the pictures with: name a local directory of a CLIPModel, "
        "for example a copy of openai/clip-vit-base-patch32"
    )


def directory(path: str | Path, what: str, config: str = "config") -> Path:
    """A local directory with a `config` file in it.

    Raises:
        DataError: It has none.
    """
    folder = Path(path)
    if not (folder / f"{config}.json").is_file():
        raise DataError(f"{what} directory {folder} has no {config}.json; give a local transformers directory")
    return folder


def load_local(kind: Any, folder: Path, **options: Any) -> Any:
    """`kind.from_pretrained` without the network, without code of the directory's own and without pickles.

    Raises:
        DataError: The directory holds something else.
    """
    if hasattr(kind, "config_class") or kind.__name__ == "AutoModel":  # a model, and no tokenizer or processor
        files = sorted(path.name for path in folder.iterdir())
        pickled = [name for name in files if name.endswith(PICKLES)]
        if pickled and not any(name.endswith(".safetensors") for name in files):
            place = folder / pickled[0]
            raise DataError(f"{place} is a pickle, which may run code, so it is not read; {AS_SAFETENSORS}")
        options["use_safetensors"] = True
    if kind.__name__.startswith("Auto"):
        options["trust_remote_code"] = False  # else a terminal is asked
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot load {kind.__name__} from {folder}: {error}") from error


def projected(out: Any) -> Tensor:
    """transformers 5 returns an object where earlier releases returned the projected features."""
    return out if isinstance(out, Tensor) else out.pooler_output


class Clip:
    """Image and text features of a local `CLIPModel` directory (Radford et al., 2021), in the shared space."""

    def __init__(self, path: str | Path, batch: int = 64, device: str | torch.device = "cpu"):
        from transformers import AutoImageProcessor, CLIPModel, CLIPTokenizer

        folder = directory(path, "CLIP")
        self.model = load_local(CLIPModel, folder, dtype=torch.float32).eval().to(device)
        self.processor = load_local(AutoImageProcessor, folder)
        self.tokenizer = load_local(CLIPTokenizer, folder)
        self.batch = batch
        self.name = folder.name

    @torch.no_grad()
    def images(self, pictures: np.ndarray) -> Tensor:
        """fp32 `[N, d]`, not normalised."""
        parts = []
        for start in range(0, len(pictures), self.batch):
            chunk = [Image.fromarray(p) for p in pictures[start : start + self.batch]]
            pixels = self.processor(images=chunk, return_tensors="pt")["pixel_values"].to(self.model.device)
            parts.append(projected(self.model.get_image_features(pixel_values=pixels)))
        return torch.cat(parts).float().cpu()

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """fp32 `[N, d]`, not normalised."""
        encoded = self.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
        wanted = ("input_ids", "attention_mask")
        inputs = {name: tensor.to(self.model.device) for name, tensor in encoded.items() if name in wanted}
        return projected(self.model.get_text_features(**inputs)).float().cpu()


class Dino:
    """The class token after the final norm of any local ViT or DINO directory (Caron et al., 2021)."""

    def __init__(self, path: str | Path, batch: int = 64, device: str | torch.device = "cpu"):
        from transformers import AutoImageProcessor, AutoModel

        folder = directory(path, "ViT")
        self.model = load_local(AutoModel, folder, dtype=torch.float32).eval().to(device)
        self.processor = load_local(AutoImageProcessor, folder)
        self.batch = batch
        self.name = folder.name

    @torch.no_grad()
    def images(self, pictures: np.ndarray) -> Tensor:
        """fp32 `[N, d]`."""
        parts = []
        for start in range(0, len(pictures), self.batch):
            chunk = [Image.fromarray(p) for p in pictures[start : start + self.batch]]
            pixels = self.processor(images=chunk, return_tensors="pt")["pixel_values"].to(self.model.device)
            parts.append(self.model(pixel_values=pixels).last_hidden_state[:, 0])
        return torch.cat(parts).float().cpu()
