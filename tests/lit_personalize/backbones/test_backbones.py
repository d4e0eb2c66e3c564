"""Loading, full-size parameter counts on the meta device, and clear errors for broken bases."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lit_personalize.adapters.key_value_delta import select_layers
from lit_personalize.adapters.lora import TARGETS, LoRA
from lit_personalize.backbones.base import StableDiffusion
from lit_personalize.backbones.fingerprint import fingerprint_of
from lit_personalize.backbones.loading import load_base
from lit_personalize.errors import DataError, UsageError

SD: dict[str, Any] = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip
FULL_SIZE: dict[str, dict[str, Any]] = {
    "sd1": {**SD, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {**SD, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "sdxl": {
        "sample_size": 128, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
        "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "total", "cross_layers", "key_value", "cross"),
    [
        ("sd1", 859_520_964, 16, 19_169_280, 43_962_560 - 12_480),
        ("sd2", 865_910_724, 16, 25_559_040, 50_352_320 - 12_480),
        ("sdxl", 2_567_463_684, 70, 340_787_200, 545_670_400 - 83_200),
    ],
)
def test_full_size_counts(family: str, total: int, cross_layers: int, key_value: int, cross: int) -> None:
    """What Custom Diffusion trains on real bases; `cross` is without the output biases."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**FULL_SIZE[family])
    assert sum(p.numel() for p in unet.parameters()) == total
    layers = select_layers(unet, "cross_kv")
    assert len(layers) == 2 * cross_layers
    assert sum(m.weight.numel() for m in layers.values()) == key_value
    assert sum(m.weight.numel() for m in select_layers(unet, "cross").values()) == cross


@pytest.mark.parametrize(
    ("family", "attention", "key_value", "query_value", "blocks"),
    [
        ("sd1", 199_296, 49_536, 99_648, 948_096),  # query_value: the length of a Weights2Weights vector
        ("sd2", 207_488, 57_728, 103_744, 956_288),
        ("sdxl", 1_451_520, 453_120, 725_760, 3_009_920),
    ],
)
def test_full_size_lora_counts(family: str, attention: int, key_value: int, query_value: int, blocks: int) -> None:
    """Parameters of rank 1 for every name in `TARGETS`, and rank times as many at a higher rank.

    `blocks` is in * taps + out, summed over the layers of transformers and of residual blocks without `time_emb_proj`.
    """
    from diffusers import DDPMScheduler, UNet2DConditionModel

    with torch.device("meta"):
        base = StableDiffusion(UNet2DConditionModel(**FULL_SIZE[family]), torch.nn.Identity(), [], [],
                               DDPMScheduler(), fingerprint="")  # fmt: skip
    counts = {"attention": attention, "key_value": key_value, "query_value": query_value, "blocks": blocks}
    assert set(counts) == set(TARGETS)
    for rank, (targets, count) in enumerate(counts.items(), start=1):
        adapter = LoRA(rank=rank, targets=targets, name=targets)
        adapter.attach(base)
        assert sum(p.numel() for p in adapter.parameters()) == rank * count, targets


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(tiny_bases: dict[str, Path], tmp_path: Path, part: str) -> None:
    broken = shutil.copytree(tiny_bases["sd1"], tmp_path / "base")
    shutil.rmtree(broken / part)
    with pytest.raises(DataError, match=f"lacks {part}"):
        load_base(broken)


def test_missing_weights_are_named(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_bases["sdxl"], tmp_path / "base")
    for file in (broken / "text_encoder_2").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(DataError, match="text_encoder_2 has a config but no weights"):
        load_base(broken)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_pickled_weights_are_never_read(
    tiny_bases: dict[str, Path], tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone they are refused, by name and with the way out; beside safetensors they are not opened."""
    from diffusers import DiffusionPipeline

    base = shutil.copytree(tiny_bases["sd1"], tmp_path / "base")
    (weights,) = (base / part).glob("*.safetensors")
    pickled = weights.with_name("diffusion_pytorch_model.bin" if part == "unet" else "pytorch_model.bin")
    torch.save(load_file(weights), pickled)
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail(f"a pickle was opened: {a[:1]}"))
    assert load_base(base).fingerprint == fingerprint_of(tiny_bases["sd1"])
    weights.unlink()
    with pytest.raises(DataError, match=rf"{part}/{pickled.name} is a pickle.*save_pretrained\(NEW, safe_serial"):
        load_base(base)
    monkeypatch.setattr(torch, "load", load)
    DiffusionPipeline.from_pretrained(base).save_pretrained(tmp_path / "new", safe_serialization=True)
    found, own = (load_base(p).components()[part].state_dict() for p in (tmp_path / "new", tiny_bases["sd1"]))
    assert all(torch.equal(value, found[name]) for name, value in own.items())


def test_damaged_weights_are_named(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_bases["sd1"], tmp_path / "base")
    weights = next((broken / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DataError, match="cannot load unet"):
        load_base(broken)


def test_no_base_and_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not found"):
        load_base(tmp_path / "nothing")
    with pytest.raises(DataError, match="no model_index.json"):
        load_base(tmp_path)
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(DataError, match="only .safetensors"):
        load_base(tmp_path / "model.ckpt")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UsageError, match="base_config"):
        load_base(tmp_path / "model.safetensors")


def test_fingerprint_follows_the_weights_and_edits(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_bases["sd1"], tmp_path / "base")
    assert fingerprint_of(copy) == fingerprint_of(tiny_bases["sd1"])
    assert fingerprint_of(copy, ["edit"]) != fingerprint_of(copy)
    assert len({fingerprint_of(path) for path in tiny_bases.values()}) == len(tiny_bases)


def test_fp16_vae_overflow_is_reported(tiny_bases: dict[str, Path]) -> None:
    base = load_base(tiny_bases["sdxl"])
    with torch.no_grad():
        base.vae.encoder.conv_in.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="vae_dtype: float32"):
        base.encode_pixels(torch.zeros(1, 3, 32, 32))


def test_sdxl_in_fp16_keeps_its_vae_in_fp32(tiny_bases: dict[str, Path]) -> None:
    base = load_base(tiny_bases["sdxl"], dtype="float16")
    assert base.dtype == torch.float16 and base.vae.dtype == torch.float32
    own = load_base(tiny_bases["sdxl"]).vae.state_dict()
    assert all(torch.equal(own[name], value) for name, value in base.vae.state_dict().items()), "rounded on the way"


def test_text_conditioning_is_what_stock_pipelines_compute(tiny_bases: dict[str, Path]) -> None:
    from diffusers import StableDiffusionXLPipeline

    base = load_base(tiny_bases["sdxl"])
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_bases["sdxl"], local_files_only=True)
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        encoder.config.eos_token_id = pipe.tokenizer.eos_token_id
    pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer.eos_token_id
    states, _, pooled, _ = pipe.encode_prompt("a photo of a cat", device="cpu", do_classifier_free_guidance=False)
    ours = base.condition(["a photo of a cat"])
    torch.testing.assert_close(ours.states, states)
    torch.testing.assert_close(ours.pooled, pooled)


def test_a_cut_caption_is_warned_of_once(tiny_bases: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    base = load_base(tiny_bases["sd1"])
    room = base.tokenizers[0].model_max_length - 2
    words = " ".join(["cat"] * room)
    base.tokenize([words, "a cat"])
    assert not caplog.records
    for _ in range(2):
        ids = base.tokenize([f"{words} dog dog", "a cat"])
    assert ids[0].shape == (2, room + 2)
    assert [r.message for r in caplog.records] == [
        f"a caption is 2 tokens too long and loses its end 'dog dog': {words} dog dog"
    ]
