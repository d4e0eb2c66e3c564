"""Merged pipelines load with plain `from_pretrained` and are checked weight by weight."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_personalize.adapters.protocol import Adapter, AdapterWeights
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.errors import DataError, VerificationError
from lit_personalize.export.exporter import export
from lit_personalize.export.verify import adapters_in, exported_of, verify

Train = Callable[[Path, list[Adapter]], tuple[Base, AdapterWeights]]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_merged_pipeline_needs_no_adapter(
    tiny_bases: dict[str, Path], train: Train, everything: list[Adapter], tmp_path: Path, family: str
) -> None:
    from diffusers import DiffusionPipeline

    base, weights = train(tiny_bases[family], everything)
    before = {name: p.clone() for name, p in base.unet.state_dict().items()}
    merged = export(weights, tmp_path, base, "run", ["pipeline"])[-1]
    assert merged.kind == "pipeline" and all(torch.equal(base.unet.state_dict()[n], p) for n, p in before.items())
    # The stock pipeline expands `<new1>` to its three rows itself; the picture is the adapter's.
    report = verify([merged], base, weights, "a photo of a <new1> cat")
    assert report.picture_difference is not None and report.files[0].layers == len(weights.deltas())
    pipe = DiffusionPipeline.from_pretrained(merged.path, local_files_only=True)
    layer = next(iter(weights.dense))
    frozen = load_base(tiny_bases[family]).unet.get_submodule(layer.removeprefix("unet.")).weight
    placed = pipe.unet.get_submodule(layer.removeprefix("unet.")).weight
    torch.testing.assert_close(placed - frozen, weights.dense[layer], atol=1e-6, rtol=1e-5)
    row = pipe.text_encoder.get_input_embeddings().weight[pipe.tokenizer.convert_tokens_to_ids("<new1>_2")]
    assert torch.equal(row, weights.tokens["<new1>"][0][2])


def test_scheduler_flags_and_other_parts_are_the_base_s_own(
    tiny_bases: dict[str, Path], train: Train, everything: list[Adapter], tmp_path: Path
) -> None:
    """Verification compares with DDIM; what users load samples as the base does, and holds no pickle."""
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler
    from transformers import CLIPImageProcessor

    own = shutil.copytree(tiny_bases["sdxl"], tmp_path / "base")
    scheduler = EulerDiscreteScheduler(beta_start=0.001, beta_end=0.011, beta_schedule="scaled_linear", steps_offset=1)
    scheduler.save_pretrained(own / "scheduler")
    index = json.loads((own / "model_index.json").read_text())
    index |= {"scheduler": ["diffusers", "EulerDiscreteScheduler"], "force_zeros_for_empty_prompt": True}
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    index |= {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}
    (own / "model_index.json").write_text(json.dumps(index))
    CLIPImageProcessor(crop_size=32).save_pretrained(own / "feature_extractor")
    (own / "image_encoder").mkdir()
    (own / "image_encoder" / "pytorch_model.bin").write_bytes(b"a pickle")

    base, weights = train(own, everything)
    merged = export(weights, tmp_path, base, "run", ["pipeline"])[-1]
    assert verify([merged], base, weights, "a photo of a <new1> cat").picture_difference is not None
    pipe = DiffusionPipeline.from_pretrained(merged.path, local_files_only=True)
    assert type(pipe.scheduler) is EulerDiscreteScheduler and pipe.config.force_zeros_for_empty_prompt is True
    for file in ("scheduler/scheduler_config.json", "feature_extractor/preprocessor_config.json"):
        assert (merged.path / file).read_bytes() == (own / file).read_bytes()
    written = json.loads((merged.path / "model_index.json").read_text())
    assert written == {**index, "image_encoder": [None, None], "_diffusers_version": written["_diffusers_version"]}
    assert not (merged.path / "image_encoder").exists()


def test_a_changed_weight_or_a_missing_part_fails(
    tiny_bases: dict[str, Path], train: Train, everything: list[Adapter], tmp_path: Path
) -> None:
    base, weights = train(tiny_bases["sd1"], everything)
    merged = export(weights, tmp_path, base, "run", ["pipeline"])[-1]
    file = merged.path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = "decoder.conv_in.weight"
    save_file({**tensors, name: tensors[name] * 1.001}, file, {"format": "pt"})
    with pytest.raises(VerificationError, match="vae.decoder.conv_in.weight differs"):
        verify([merged], base, weights)
    (merged.path / "model_index.json").unlink()
    with pytest.raises(DataError, match="has no model_index.json: it is not a diffusers pipeline"):
        verify([merged], base, weights)


def test_a_pipeline_is_replaced_whole_and_found_again(
    tiny_bases: dict[str, Path], train: Train, everything: list[Adapter], tmp_path: Path
) -> None:
    base, weights = train(tiny_bases["sd1"], everything)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "left.txt").write_text("of an earlier export")
    export(weights, tmp_path, base, "run", ["diffusers", "peft", "pipeline"])
    assert not (tmp_path / "pipeline" / "left.txt").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    found = exported_of(adapters_in(tmp_path))
    assert [item.kind for item in found] == ["embedding", "diffusers", "peft", "peft", "pipeline"]
    assert [item.name for item in found][2:] == ["peft/text_encoder", "peft/unet", "pipeline"]
