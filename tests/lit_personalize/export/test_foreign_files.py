"""Files of other trainers: read as the stock client reads them, or refused with the reason."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.protocol import Adapter, AdapterWeights
from lit_personalize.adapters.token_embedding import TokenEmbedding
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.errors import DataError, VerificationError
from lit_personalize.export import keys
from lit_personalize.export.exporter import export
from lit_personalize.export.inspect import inspect_file
from lit_personalize.export.loading import load_adapter, read_adapter
from lit_personalize.export.verify import adapters_in, exported_of, verify

Train = Callable[[Path, list[Adapter]], tuple[Base, AdapterWeights]]


def _peft_of(path: Path, options: dict[str, object], part: str = "unet") -> torch.nn.Module:
    """A module with random PEFT factors, made without any code of ours."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPTextModel

    kind = UNet2DConditionModel if part == "unet" else CLIPTextModel
    return get_peft_model(kind.from_pretrained(path / part), LoraConfig(init_lora_weights=False, **options))  # type: ignore[arg-type]


def test_convolutions_are_read_and_drawn_as_the_stock_client_does(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    targets = ["proj_in", "attn2.to_k", "resnets.0.conv1"]
    model = _peft_of(tiny_bases["sd1"], {"r": 2, "lora_alpha": 2, "target_modules": targets})
    factors = {k.replace("base_model.model.", "unet.").replace(".default", ""): v.detach() * 0.3
               for k, v in model.named_parameters() if "lora_" in k}  # fmt: skip
    assert {v.ndim for v in factors.values()} == {2, 4}
    save_file(factors, tmp_path / "theirs.safetensors")
    base = load_base(tiny_bases["sd1"])
    report = verify(exported_of([tmp_path / "theirs.safetensors"]), base)
    assert report.files[0].layers == len(factors) // 2 and report.picture_difference is not None
    assert report.files[0].ranks == {"2": len(factors) // 2} and report.files[0].scales == {"1": len(factors) // 2}
    covered, attention = report.files[0].coverage.split("/")
    assert 0 < int(covered) < int(attention)


def test_a_linear_layer_written_as_a_convolution_is_written_again_as_a_linear_one(
    tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    base = load_base(tiny_bases["sd1"])
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    linear = base.unet.get_submodule(layer.removeprefix("unet."))
    down, up = torch.randn(2, linear.in_features, 1, 1), torch.randn(linear.out_features, 2, 1, 1)
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, tmp_path / "theirs.safetensors")
    weights = read_adapter(tmp_path / "theirs.safetensors", base)
    assert torch.equal(weights.low_rank[layer].down, down[:, :, 0, 0])
    assert torch.equal(weights.low_rank[layer].up, up[:, :, 0, 0])
    written = export(weights, tmp_path / "exports", base, "theirs", formats=["diffusers"])
    assert verify(written, base).files[0].layers == 1


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
            "input_blocks_4_1_transformer_blocks_0_attn2_to_k",
        ),
        ("down_blocks.2.attentions.1.proj_in", "input_blocks_8_1_proj_in"),
        ("mid_block.attentions.0.proj_out", "middle_block_1_proj_out"),
        ("up_blocks.1.attentions.2.transformer_blocks.0.ff.net.2", "output_blocks_5_1_transformer_blocks_0_ff_net_2"),
    ],
)
def test_original_block_names_of_sdxl(layer: str, name: str) -> None:
    assert keys.original(f"unet.{layer}", 2) == f"lora_unet_{name}"
    assert keys.original("unet.down_blocks.0.resnets.0.conv1", 2) is None
    assert keys.original(f"text_encoder.{layer}", 2) is None


def test_original_block_names_are_read_as_the_stock_client_does(
    tiny_bases: dict[str, Path], train: Train, tmp_path: Path
) -> None:
    base, weights = train(tiny_bases["sdxl"], [LoRA(rank=2, alpha=6.0)])
    tensors: dict[str, torch.Tensor] = {}
    stages = base.unet.config.layers_per_block
    for layer, factors in weights.low_rank.items():
        name = keys.original(layer, stages)
        assert name is not None and ("_blocks_" in name or "middle_block_1" in name)
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = factors.down, factors.up
        tensors[f"{name}.alpha"] = torch.tensor(6.0)
    save_file(tensors, tmp_path / "theirs.safetensors")
    found = read_adapter(tmp_path / "theirs.safetensors", base)
    assert set(found.low_rank) == set(weights.low_rank)
    report = verify(exported_of([tmp_path / "theirs.safetensors"]), base, weights)
    assert report.files[0].largest_error <= 1e-6 and report.files[0].scales == {"3": len(weights.low_rank)}


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_peft_settings_scale_as_peft_does(tiny_bases: dict[str, Path], tmp_path: Path, part: str) -> None:
    from peft.tuners.lora import LoraLayer

    targets = ["attn2.to_k", "attn1.to_q"] if part == "unet" else ["q_proj", "k_proj"]
    pattern = {targets[0]: 5}
    options = {"r": 4, "lora_alpha": 3, "target_modules": targets, "alpha_pattern": pattern, "use_rslora": True}
    model = _peft_of(tiny_bases["sd1"], options, part)
    model.save_pretrained(tmp_path / part)
    found = read_adapter(tmp_path / part, load_base(tiny_bases["sd1"])).low_rank
    layers = {p: m for p, m in model.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    assert {n.partition(".")[2] for n in found} == set(layers)
    for name, low_rank in found.items():
        wanted = layers[name.partition(".")[2]].get_delta_weight("default").detach()  # type: ignore[operator]
        torch.testing.assert_close(low_rank.delta(), wanted, rtol=1e-5, atol=1e-6)
    inspected = inspect_file(tmp_path / part)
    if part == "unet":
        assert inspected["format"] == "PEFT LoRA" and set(inspected["alphas"]) == {"6.0", "10.0"}


def test_alpha_of_the_metadata_is_obeyed(tiny_bases: dict[str, Path], train: Train, tmp_path: Path) -> None:
    base, weights = train(tiny_bases["sd1"], [LoRA(rank=2, alpha=6.0)])
    tensors = {}
    for layer, factors in weights.low_rank.items():
        tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"] = factors.down, factors.up
    stated = {"unet.r": 2, "unet.lora_alpha": 6.0, "unet.target_modules": sorted(n[5:] for n in weights.low_rank)}
    file = tmp_path / "theirs.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(stated)})
    assert verify(exported_of([file]), base, weights).files[0].scales == {"3": len(weights.low_rank)}
    save_file(tensors, file, {"lora_adapter_metadata": "{broken"})
    with pytest.raises(DataError, match="not JSON"):
        read_adapter(file, base)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_dora_of_kohya_files_is_that_of_peft(tiny_bases: dict[str, Path], tmp_path: Path, part: str) -> None:
    """PEFT's weight with its magnitude, from the same numbers under kohya's keys; diffusers loses the magnitudes."""
    from peft.tuners.lora import LoraLayer

    targets = ["attn2.to_k", "attn1.to_q", "resnets.0.conv1"] if part == "unet" else ["q_proj", "fc1"]
    options: dict[str, object] = {"r": 2, "lora_alpha": 3, "target_modules": targets, "use_dora": True}
    model = _peft_of(tiny_bases["sd1"], options, part)
    torch.manual_seed(0)
    layers = {p: m for p, m in model.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    tensors: dict[str, torch.Tensor] = {}
    wanted: dict[str, torch.Tensor] = {}
    for path, layer in layers.items():
        frozen = layer.get_base_layer().weight.detach().clone()
        magnitude = layer.lora_magnitude_vector["default"].weight  # type: ignore[index]
        magnitude.data.mul_(1 + 0.3 * torch.rand(magnitude.shape))
        name = keys.kohya(f"{part}.{path}", False)
        tensors[f"{name}.lora_down.weight"] = layer.lora_A["default"].weight.detach().clone()  # type: ignore[index]
        tensors[f"{name}.lora_up.weight"] = layer.lora_B["default"].weight.detach().clone()  # type: ignore[index]
        tensors[f"{name}.alpha"] = torch.tensor(3.0)
        tensors[f"{name}.dora_scale"] = magnitude.detach().clone().reshape(-1, *[1] * (frozen.ndim - 1))
        layer.merge()  # type: ignore[operator]
        wanted[f"{part}.{path}"] = (layer.get_base_layer().weight.detach() - frozen).flatten(1)
    save_file(tensors, tmp_path / "theirs.safetensors")
    base = load_base(tiny_bases["sd1"])
    found = read_adapter(tmp_path / "theirs.safetensors", base)
    assert set(found.dora) == set(found.layers()) == set(wanted) and len(wanted) >= 4
    for name, delta in wanted.items():
        torch.testing.assert_close(found.delta(name), delta, atol=1e-6, rtol=1e-5)
    assert inspect_file(tmp_path / "theirs.safetensors")["format"] == "kohya LoRA with DoRA"
    with pytest.raises(VerificationError, match="without its magnitudes of DoRA"):
        verify(exported_of([tmp_path / "theirs.safetensors"]), base)


def test_dora_of_lycoris_may_have_one_number_per_input(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """Columns of the merged weight then have the lengths that the file says, with all taps of a convolution."""
    base = load_base(tiny_bases["sd1"])
    layers = {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (64, 32),
        "unet.mid_block.resnets.0.conv1": (64, 64, 3, 3),
    }
    tensors: dict[str, torch.Tensor] = {}
    lengths: dict[str, torch.Tensor] = {}
    torch.manual_seed(0)
    for layer, (out, inputs, *taps) in layers.items():
        name = keys.kohya(layer, False)
        lengths[layer] = 1 + torch.rand(inputs)
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, inputs, *taps)
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, 2, *[1 for _ in taps])
        tensors[f"{name}.dora_scale"] = lengths[layer].reshape(1, inputs, *[1 for _ in taps])
    save_file(tensors, tmp_path / "theirs.safetensors")
    found = read_adapter(tmp_path / "theirs.safetensors", base)
    assert not found.dora and set(found.layers()) == set(layers)
    for layer, shape in layers.items():
        frozen = base.unet.get_parameter(layer.removeprefix("unet.") + ".weight").detach()
        merged = (frozen.flatten(1) + found.delta(layer)).reshape(shape)
        columns = merged.transpose(0, 1).flatten(1).norm(dim=1)
        torch.testing.assert_close(columns, lengths[layer], rtol=1e-4, atol=1e-5)


def test_embeddings_are_named_by_their_file(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    base = load_base(tiny_bases["sd1"])
    rows = torch.randn(2, 32)
    save_file({"emb_params": rows}, tmp_path / "mystyle.safetensors")
    assert torch.equal(read_adapter(tmp_path / "mystyle.safetensors", base).tokens["<mystyle>"][0], rows)
    (report,) = verify(exported_of([tmp_path / "mystyle.safetensors"]), base).files
    assert report.kind == "embedding"
    save_file({"<wide>": torch.randn(1, 48)}, tmp_path / "wide.safetensors")
    with pytest.raises(DataError, match="has widths"):
        load_adapter(tmp_path / "wide.safetensors", base)


def test_what_cannot_be_read_is_refused_with_its_kind(
    tiny_bases: dict[str, Path], train: Train, tmp_path: Path
) -> None:
    base, weights = train(tiny_bases["sd1"], [LoRA(rank=2)])
    (item,) = export(weights, tmp_path, base, "run", ["kohya"])
    from safetensors.torch import load_file

    tensors = load_file(item.path)
    name = next(iter(tensors)).partition(".")[0]
    file = tmp_path / "theirs.safetensors"
    for change, message in (
        ({f"{name}.dora_scale": torch.ones(3)}, "magnitude of .* is not one number per output"),
        ({f"{name}.hada_w1_a": torch.ones(3, 3)}, "LoHa files are not read"),
        ({f"{name}.lora_down.weight": torch.ones(2, 7)}, "the base has"),
        ({f"{name}.lora_up.weight": torch.ones(32, 5)}, "factors of ranks 2 and 5"),
        ({f"{name}.lora_up.weight": torch.ones(32)}, "factors are"),
        ({f"{name}.alpha": torch.tensor(2)}, "adapters hold floating-point"),
    ):
        save_file({**tensors, **change}, file)
        with pytest.raises(DataError, match=message):
            read_adapter(file, base)
    save_file({}, file)
    with pytest.raises(DataError, match="holds no tensor"):
        read_adapter(file, base)


def test_verify_and_inspect_refuse_pickles_too(tmp_path: Path) -> None:
    disguised = tmp_path / "adapter.safetensors"
    disguised.write_bytes(pickle.dumps({"unet": 1}))
    with pytest.raises(DataError, match="is a pickle"):
        inspect_file(disguised)
    with pytest.raises(DataError, match="is a pickle"):
        exported_of(adapters_in(tmp_path))
    disguised.unlink()
    torch.save({}, tmp_path / "adapter.bin")
    with pytest.raises(DataError, match="is a pickle"):
        adapters_in(tmp_path)


def test_inspect_reports_what_a_file_says(tiny_bases: dict[str, Path], train: Train, tmp_path: Path) -> None:
    adapters: list[Adapter] = [LoRA(rank=2, alpha=4.0, text_encoder=True), TokenEmbedding("<new1>", "cat")]
    base, weights = train(tiny_bases["sdxl"], adapters)
    files = {
        f.name: inspect_file(f.path) for f in export(weights, tmp_path, base, "run", ["diffusers", "kohya", "peft"])
    }
    kohya = files["run.kohya.safetensors"]
    assert kohya["format"] == "kohya LoRA" and set(kohya["ranks"]) == {"2"} and set(kohya["alphas"]) == {"4.0"}
    assert set(kohya["components"]) == {"lora_unet", "lora_te1", "lora_te2"}
    diffusers = files["pytorch_lora_weights.safetensors"]
    assert diffusers["base_fingerprint"] == base.fingerprint and set(diffusers["alphas"]) == {"2.0"}
    assert set(diffusers["components"]) == {"unet", "text_encoder", "text_encoder_2"}
    assert sum(diffusers["components"].values()) == diffusers["layers"] == len(weights.low_rank)
    assert diffusers["architecture"] == "stable-diffusion-xl-v1-base/lora" and diffusers["tokens"] == ["<new1>"]
    assert set(files["peft/text_encoder_2"]["alphas"]) == {"4.0"}
    pair = files["textual_inversion/learned_embeds_2.safetensors"]
    assert pair["tokens"] == ["<new1>"] and pair["architecture"].endswith("/textual-inversion")
