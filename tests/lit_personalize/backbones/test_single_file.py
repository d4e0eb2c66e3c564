"""A base as one checkpoint in the layouts of the Stable Diffusion 1, 2 and XL releases: it is the same model."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_personalize.backbones.loading import load_base
from lit_personalize.cli.main import main
from lit_personalize.errors import DataError

BLOCKS = 2  # of the tiny bases: two resolutions, one layer each
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    # A step down is a resnet (with attention) and then the downsampler; the first convolution is block 0.
    "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0", "down_blocks.1.attentions.0": "input_blocks.3.1",
    # A step up has one layer more, for the skip connection of the step's entry.
    "up_blocks.0.resnets.0": "output_blocks.0.0", "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0", "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0", "up_blocks.1.resnets.1": "output_blocks.3.0",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
OPEN_CLIP = [
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"embeddings\.token_embedding", "token_embedding"),
    (r"final_layer_norm", "ln_final"),
    (r"encoder\.layers", "transformer.resblocks"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"self_attn", "attn"),
    (r"fc1", "c_fc"),
    (r"fc2", "c_proj"),
]
VAE = [
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda found: f"up.{BLOCKS - 1 - int(found[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{BLOCKS - 1 - int(found[1])}.upsample"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
]


def _unet_key(name: str) -> str:
    stem = max((s for s in UNET if name.startswith(f"{s}.")), key=len)
    rest = name.removeprefix(f"{stem}.")
    part, _, end = rest.partition(".")
    return f"model.diffusion_model.{UNET[stem]}.{RESNET[part] + '.' + end if '.resnets.' in name else rest}"


def _vae_entry(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    key = name
    for pattern, replacement in VAE:
        key = re.sub(pattern, replacement, key)  # type: ignore[call-overload]
    if ".attn_1." in key and tensor.ndim == 2:
        tensor = tensor[..., None, None]  # attention of the VAE was made of 1x1 convolutions
    return f"first_stage_model.{key}", tensor.contiguous()


def _clip(text: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Keys of OpenAI's CLIP, as in SD1 and SDXL's first encoder."""
    return {f"{prefix}transformer.text_model.{name.removeprefix('text_model.')}": t for name, t in text.items()}


def _open_clip(text: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Keys of OpenCLIP, as in SD2 and SDXL's second encoder: Q, K and V in one matrix, the projection transposed."""
    tensors: dict[str, Tensor] = {}
    stacked: dict[str, dict[str, Tensor]] = {}
    for name, tensor in text.items():
        key = name.removeprefix("text_model.")
        for pattern, replacement in OPEN_CLIP:
            key = re.sub(pattern, replacement, key)
        if found := re.fullmatch(r"(.+\.attn\.)([qkv])_proj\.(weight|bias)", key):
            stacked.setdefault(f"{found[1]}in_proj_{found[3]}", {})[found[2]] = tensor
        elif key == "text_projection.weight":
            tensors["text_projection"] = tensor.T
        else:
            tensors[key] = tensor
    tensors |= {key: torch.cat([parts[p] for p in "qkv"]) for key, parts in stacked.items()}
    tensors.setdefault("text_projection", torch.eye(len(tensors["ln_final.weight"])))  # in SD2's files, but not used
    return {f"{prefix}model.{key}": tensor.contiguous() for key, tensor in tensors.items()}


def write_single_file(folder: Path, path: Path) -> Path:
    """Write the tiny base in `folder` as one checkpoint with the keys of its family's original releases."""
    found = {p.name: load_file(next(p.glob("*.safetensors"))) for p in folder.iterdir() if any(p.glob("*.safetensors"))}
    tensors = {_unet_key(name): t for name, t in found["unet"].items()}
    tensors |= dict(_vae_entry(name, t) for name, t in found["vae"].items())
    assert len(tensors) == len(found["unet"]) + len(found["vae"]), "two names fell together"
    if "text_encoder_2" in found:
        tensors |= _clip(found["text_encoder"], "conditioner.embedders.0.")
        tensors |= _open_clip(found["text_encoder_2"], "conditioner.embedders.1.")
    else:
        write = _clip if folder.name == "sd1" else _open_clip
        tensors |= write(found["text_encoder"], "cond_stage_model.")
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def single_file(tiny_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(tiny_bases["sd1"], tmp_path_factory.mktemp("single") / "model.safetensors")


@pytest.mark.parametrize("family", ["sd1", "sd2", "sd2-v", "sdxl"])
def test_it_predicts_encodes_and_decodes_as_the_directory_does(
    tiny_bases: dict[str, Path], tmp_path: Path, family: str
) -> None:
    single_file = write_single_file(tiny_bases[family], tmp_path / "model.safetensors")
    directory, file = load_base(tiny_bases[family]), load_base(single_file, config=tiny_bases[family])
    assert file.schedule.prediction_type == directory.schedule.prediction_type
    draws = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, 16, 16, generator=draws)
    pixels = torch.rand(1, 3, 32, 32, generator=draws) * 2 - 1
    t = torch.tensor([10, 900])
    with torch.no_grad():
        expected, found = (b.predict(z, t, b.condition(["a photo of a cat", ""])) for b in (directory, file))
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for ours, theirs in zip(file.encode_pixels(pixels), directory.encode_pixels(pixels), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    torch.testing.assert_close(file.decode(z), directory.decode(z), rtol=0, atol=0)
    torch.testing.assert_close(file.schedule.alphas_cumprod, directory.schedule.alphas_cumprod, rtol=0, atol=0)
    assert file.fingerprint != directory.fingerprint, "another file is another base to adapters"


@pytest.mark.parametrize("vae_dtype", ["float32", "bfloat16"])
def test_the_vae_is_read_in_its_own_precision(tiny_bases: dict[str, Path], single_file: Path, vae_dtype: str) -> None:
    how = {"dtype": "bfloat16", "vae_dtype": vae_dtype}
    own, found = (
        load_base(path, config=config, **how).vae.state_dict()
        for path, config in ((tiny_bases["sd1"], None), (single_file, tiny_bases["sd1"]))
    )
    exact = load_base(tiny_bases["sd1"]).vae.state_dict()
    for name, value in exact.items():
        assert torch.equal(own[name], value.to(getattr(torch, vae_dtype))) and torch.equal(found[name], own[name])


def test_litp_draws_the_same_picture(
    tiny_bases: dict[str, Path], single_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["sample", "a cat", "--steps", "2", "-o"]
    assert main([*how, str(tmp_path / "directory"), "--base", str(tiny_bases["sd1"])]) == 0
    given = ["--base", str(single_file), "--base-config", str(tiny_bases["sd1"])]
    assert main([*how, str(tmp_path / "file"), *given]) == 0
    one, two = (Image.open(tmp_path / place / "00_0.png") for place in ("directory", "file"))
    assert ImageChops.difference(one, two).getbbox() is None
    assert main([*how, str(tmp_path / "none"), "--base", str(single_file)]) == 2
    assert "name a diffusers directory of the same family" in capsys.readouterr().err


def test_litp_evaluates_a_single_file(
    tiny_bases: dict[str, Path], single_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "real.png")
    given = ["evaluate", "--base", str(single_file), "--references", str(tmp_path), "--prompts", "a cat"]
    given += ["--clip", str(tmp_path), "--adapter", str(tmp_path / "none")]
    assert main(given) == 2
    assert "name a diffusers directory of the same family" in capsys.readouterr().err
    assert main([*given, "--base-config", str(tiny_bases["sd1"])]) == 3
    assert str(tmp_path / "none") in capsys.readouterr().err, "the base was read, the adapter is missing"


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "first_stage_model.", "cond_stage_model."])
def test_a_file_without_one_of_the_models_is_refused(
    tiny_bases: dict[str, Path], single_file: Path, tmp_path: Path, prefix: str
) -> None:
    partial = tmp_path / "partial.safetensors"
    save_file({k: t for k, t in load_file(single_file).items() if not k.startswith(prefix)}, partial)
    with pytest.raises(DataError, match=r"cannot read partial\.safetensors"):
        load_base(partial, config=tiny_bases["sd1"])


def test_the_noise_schedule_is_that_of_the_config_folder(
    tiny_bases: dict[str, Path], single_file: Path, tmp_path: Path
) -> None:
    """A checkpoint does not say what its UNet predicts."""
    config = shutil.copytree(tiny_bases["sd1"], tmp_path / "config")
    scheduler = config / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"epsilon"', '"v_prediction"'))
    assert load_base(single_file, config=config).schedule.prediction_type == "v_prediction"
    assert load_base(single_file, config=tiny_bases["sd1"]).schedule.prediction_type == "epsilon"


def test_a_folder_that_gives_no_configs_is_named(single_file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(f"{tmp_path} has no model_index.json")):
        load_base(single_file, config=tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDi')
    with pytest.raises(DataError, match=r"model_index\.json is damaged"):
        load_base(single_file, config=tmp_path)
