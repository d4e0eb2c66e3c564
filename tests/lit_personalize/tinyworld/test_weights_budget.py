"""The committed weights: small, half precision, free of local paths, and loadable by stock diffusers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lit_personalize.backbones.loading import tinyworld_directory

WEIGHTS = tinyworld_directory().parent
LARGEST = 30e6
"""Bytes of everything below `weights/`: a wheel carries it, and so does every clone."""
ABSOLUTE = re.compile(r"^(/[\w.~-]+){2,}|^~/|^[A-Za-z]:[\\/]|^file:")


def _strings(value: object) -> list[str]:
    """All keys and values of a JSON document that are text."""
    if isinstance(value, dict):
        return [*map(str, value), *(s for v in value.values() for s in _strings(v))]
    if isinstance(value, list):
        return [s for v in value for s in _strings(v)]
    return [value] if isinstance(value, str) else []


def _documents() -> list[Path]:
    found = sorted(WEIGHTS.rglob("*.json"))
    assert {p.parent.name for p in found} >= {"base", "unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    return found


def test_all_files_together_are_small() -> None:
    files = [p for p in WEIGHTS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= LARGEST
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".txt", ".md"}, "no pickles, no pictures"


def test_weights_of_the_base_are_half_precision() -> None:
    files = sorted((WEIGHTS / "base").rglob("*.safetensors"))
    assert {p.parent.name for p in files} == {"unet", "vae", "text_encoder"}
    for path in files:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        assert tensors and {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float16}, path
        assert all(bool(torch.isfinite(t).all()) for t in tensors.values()), path


def test_no_document_names_the_place_where_it_was_made() -> None:
    for path in _documents():
        document = json.loads(path.read_text(encoding="utf-8"))
        texts = _strings(document)
        assert "_name_or_path" not in texts, path
        # A tokenizer's vocabulary may hold any text; its own configuration may not.
        checked = [] if path.name == "tokenizer.json" else texts
        assert [t for t in checked if ABSOLUTE.search(t)] == [], path
    for path in WEIGHTS.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert [v for v in (file.metadata() or {}).values() if ABSOLUTE.search(v)] == [], path


@pytest.mark.parametrize(
    ("text", "absolute"),
    [("/home/someone/base", True), ("C:\\base", True), ("~/base", True), ("file:///base", True), ("diffusers", False),
     ("a/b", False), ("/", False)],
)  # fmt: skip
def test_what_counts_as_absolute(text: str, absolute: bool) -> None:
    assert bool(ABSOLUTE.search(text)) == absolute


def test_stock_diffusers_loads_the_base_and_draws() -> None:
    from diffusers import StableDiffusionPipeline

    # Without a dtype, transformers keeps the text encoder in half precision and diffusers widens the UNet.
    pipe = StableDiffusionPipeline.from_pretrained(WEIGHTS / "base", local_files_only=True, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe("a red cat", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0))
    (picture,) = drawn.images
    assert picture.shape[2] == 3 and picture.std() > 0.01, "a picture, not one colour"
