"""LoRA's options: which layers, which rank and scale, DoRA, and learning rates of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_personalize.adapters import layer_selection
from lit_personalize.adapters.key_value_delta import KeyValueDelta
from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.protocol import Adapter
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.batch import Batch
from lit_personalize.errors import UsageError, VerificationError
from lit_personalize.export.exporter import export
from lit_personalize.export.loading import read_adapter
from lit_personalize.export.verify import verify
from lit_personalize.objectives.denoising import Denoising

CONTENT, STYLE = "up_blocks.0.attentions.0", "up_blocks.0.attentions.1"


def attached(path: Path, moved: float = 0.0, dtype: str = "float32", **options: Any) -> tuple[Base, LoRA]:
    """A LoRA on a fresh base, its factors moved by normal draws of this size."""
    base = load_base(path, dtype=dtype)
    adapter = LoRA(**options)
    adapter.attach(base)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for factor in adapter.named_factors().values():
            factor.add_(moved * torch.randn(factor.shape, generator=draws))
    adapter.refresh(base.dtype)
    return base, adapter


def ask(base: Base, adapters: list[Adapter] | None) -> torch.Tensor:
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    return base.predict(z, torch.tensor([400]), base.condition(["a photo of a cat"]), adapters)


# ---- which layers ------------------------------------------------------------------------------------


def test_a_file_names_the_layers_that_train(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    listed = tmp_path / "layers.txt"
    listed.write_text(
        "# found by hand\nunet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k\n\n"
        "up_blocks.*attn2.to_v  # a pattern\ntext_encoder.*mlp.fc1\n"
    )
    base, adapter = attached(tiny_bases["sd1"], targets=str(listed))
    known = layer_selection.changeable(base.components())
    expected = [
        n for n in known
        if n == "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
        or (n.startswith("unet.up_blocks.") and n.endswith("attn2.to_v"))
        or (n.startswith("text_encoder.") and n.endswith("mlp.fc1"))
    ]  # fmt: skip
    assert sorted(adapter.layers()) == sorted(expected) and len(expected) >= 5
    assert LoRA(targets=["attn2.to_k", "attn2.to_v"])._chosen(known) == LoRA(targets="key_value")._chosen(known)


@pytest.mark.parametrize("which", ["attention", "mlp", "blocks", ["self_attn.out_proj"]])
def test_text_encoders_have_targets_of_their_own(tiny_bases: dict[str, Path], which: str | list[str]) -> None:
    ends = {"attention": ("_proj",), "mlp": ("fc1", "fc2"), "blocks": ("_proj", "fc1", "fc2")}
    wanted = ends[which] if isinstance(which, str) else tuple(which)
    known = layer_selection.changeable(load_base(tiny_bases["sdxl"]).components())
    chosen = LoRA(targets=[], text_encoder=which)._chosen(known)
    assert chosen == [n for n in known if n.startswith("text_encoder") and ".layers." in n and n.endswith(wanted)]
    assert {n.partition(".")[0] for n in chosen} == {"text_encoder", "text_encoder_2"}


def test_halves_of_b_lora_are_disjoint_and_make_the_whole(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """B-LoRA (Frenkel et al., 2024): each half of its file is a LoRA file by itself, by the prefix of its keys."""
    base, adapter = attached(tiny_bases["sdxl"], 0.1, rank=2, in_blocks=[CONTENT, STYLE])
    known = layer_selection.changeable(base.components())
    content, style = (LoRA(in_blocks=[block])._chosen(known) for block in (CONTENT, STYLE))
    assert not set(content) & set(style) and {*content, *style} == set(adapter.layers())
    export(adapter.export_weights(), tmp_path, base, "run", ["diffusers"])
    whole = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    for block, layers in ((CONTENT, content), (STYLE, style)):
        half = tmp_path / f"{block}.safetensors"
        save_file({k: v for k, v in whole.items() if k.startswith(f"unet.{block}.")}, half)
        read = read_adapter(half, base)
        assert set(read.layers()) == set(layers)
        for layer in layers:
            torch.testing.assert_close(read.delta(layer), adapter.delta(layer).detach())


def test_b_lora_on_sdxl_has_the_size_of_the_paper() -> None:
    """160 linear layers, 28.2 M parameters at rank 64, of 92.9 M for all attention."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
    known = layer_selection.changeable({"unet": unet})

    def size(layers: list[str]) -> float:
        shapes = [unet.get_submodule(n.removeprefix("unet.")).weight.shape for n in layers]
        return 64 * sum(sum(shape) for shape in shapes) / 1e6

    both = LoRA(in_blocks=[CONTENT, STYLE])._chosen(known)
    assert len(both) == 160 and size(both) == pytest.approx(28.2, abs=0.05)
    assert size(LoRA()._chosen(known)) == pytest.approx(92.9, abs=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["attn2.to_k", "attn2.to_kk"]}, "'attn2.to_kk' matches no layer"),
        ({"targets": ["attn2.(to_k"]}, "no layer name or regular expression"),
        ({"targets": "attentions"}, "unknown LoRA targets 'attentions'; use one of attention"),
        ({"targets": []}, "trains no layer"),
        ({"in_blocks": ["up_blocks.7"]}, "lies in 'up_blocks.7'"),
        ({"rank_pattern": {"attn3.*": 2}}, "rank_pattern: 'attn3.*' matches none"),
        ({"rank_pattern": {"attn2.*": 0}}, "rank must be at least 1"),
        ({"block_lr": {"text_encoder.*": 1e-5}}, "block_lr: 'text_encoder.*' matches none"),
        ({"block_lr": {"mid_block.*": -1e-5}}, "block_lr must not be negative"),
        ({"text_encoder": "mpl"}, "unknown LoRA text_encoder 'mpl'"),
    ],
)
def test_what_names_nothing_is_refused(tiny_bases: dict[str, Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(").replace("*", r"\*")):
        LoRA(**options).attach(load_base(tiny_bases["sd1"]))


# ---- ranks and scales --------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_scales_are_those_of_the_patterns(tiny_bases: dict[str, Path], tmp_path: Path, rslora: bool) -> None:
    """s = alpha / R, or alpha / √R, with each layer's own alpha and R, in the forward pass and in the files."""
    patterns: dict[str, Any] = {"rank_pattern": {"mid_block.*to_k": 5, "attn2.*": 3}, "alpha_pattern": {"to_v": 6.0}}
    base, adapter = attached(tiny_bases["sd1"], 0.1, rank=2, use_rslora=rslora, **patterns)
    for layer in adapter.layers():
        rank = 5 if "mid_block" in layer and layer.endswith("to_k") else 3 if ".attn2." in layer else 2
        alpha = 6.0 if layer.endswith("to_v") else float(rank)
        down, up = adapter.factor(f"{layer}:A"), adapter.factor(f"{layer}:B")
        assert down.shape[0] == up.shape[1] == rank
        expected = alpha / (rank**0.5 if rslora else rank) * (up @ down)
        torch.testing.assert_close(adapter.delta(layer), expected)
        module = base.unet.get_submodule(layer.removeprefix("unet."))
        x = torch.randn(3, module.in_features)
        with torch.no_grad():
            bare = module.get_base_layer()(x)
        torch.testing.assert_close(module(x) - bare, x @ expected.T, atol=1e-5, rtol=1e-4)
    if rslora:
        weights = adapter.export_weights()
        report = verify(export(weights, tmp_path, base, "run", ["diffusers", "kohya", "peft"]), base, weights, "a cat")
        assert all(f.largest_error <= 1e-6 for f in report.files)


# ---- DoRA --------------------------------------------------------------------------------------------


def test_dora_trains_the_length_of_every_output(tiny_bases: dict[str, Path]) -> None:
    """The merged rows have exactly the trained magnitudes (eq. 5), and the start is the base."""
    base, adapter = attached(tiny_bases["sd1"], targets="blocks", use_dora=True, rank=2)
    torch.testing.assert_close(ask(base, [adapter]), ask(base, None), rtol=0, atol=0)
    base, adapter = attached(tiny_bases["sd1"], 0.1, targets="blocks", use_dora=True, rank=2)
    assert any("conv" in layer for layer in adapter.layers())
    for layer, scale in adapter._scales().items():
        rows = (scale.frozen() + adapter.delta(layer)).norm(dim=1)
        torch.testing.assert_close(rows, adapter.factor(f"{layer}:m").abs(), rtol=1e-5, atol=1e-6)


def test_dora_is_that_of_peft_with_its_gradients(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """The exported folder in a stock UNet: same prediction, same gradients of A, B and m."""
    from diffusers import UNet2DConditionModel
    from peft import PeftModel

    options: dict[str, Any] = {"targets": "blocks", "use_dora": True, "rank": 2, "alpha": 3.0}
    base, adapter = attached(tiny_bases["sd1"], 0.1, **options)
    export(adapter.export_weights(), tmp_path, base, "run", ["peft"])
    unet = UNet2DConditionModel.from_pretrained(tiny_bases["sd1"] / "unet")
    stock = PeftModel.from_pretrained(unet, tmp_path / "peft" / "unet", is_trainable=True)
    z, t = torch.randn(1, 4, 16, 16), torch.tensor([400])
    told = base.condition(["a cat"])
    theirs = stock(z, t, told.states, return_dict=False)[0]
    ours = base.predict(z, t, told, [adapter])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    theirs.square().sum().backward()
    ours.square().sum().backward()
    named = dict(stock.named_parameters())
    for name, factor in adapter.named_factors().items():
        layer, _, part = name.rpartition(":")
        key = {"A": "lora_A.default", "B": "lora_B.default", "m": "lora_magnitude_vector.default"}[part]
        expected = named[f"base_model.model.{layer.removeprefix('unet.')}.{key}.weight"].grad
        assert factor.grad is not None and expected is not None
        expected = expected.reshape(factor.shape)
        torch.testing.assert_close(factor.grad, expected, atol=1e-4 * float(expected.abs().max()) + 1e-7, rtol=1e-3)


def test_dora_in_bf16_keeps_small_magnitudes(tiny_bases: dict[str, Path]) -> None:
    """m a hundredth longer is that in every output, though bf16 has nothing between 1.0078 and 1.0156."""
    base, adapter = attached(tiny_bases["sd1"], dtype="bfloat16", use_dora=True)
    layer = next(iter(adapter.layers()))
    module = base.unet.get_submodule(layer.removeprefix("unet."))
    x = torch.randn(4096, module.in_features).to(torch.bfloat16)
    with torch.no_grad(), base.only([adapter]):
        before = module(x).float()
        adapter.factor(f"{layer}:m").mul_(1.01)
        after = module(x).float()
    grown = (after.abs().mean(dim=0) / before.abs().mean(dim=0)) - 1
    torch.testing.assert_close(grown, torch.full_like(grown, 1e-2), rtol=0.15, atol=0)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_dora_comes_back_in_every_format(tiny_bases: dict[str, Path], tmp_path: Path, family: str) -> None:
    options: dict[str, Any] = {"targets": ["attn2.to_k", "conv1"], "text_encoder": True, "use_dora": True, "rank": 2}
    base, adapter = attached(tiny_bases[family], 0.1, **options)
    weights = adapter.export_weights()
    files = export(weights, tmp_path, base, "run", ["diffusers", "kohya", "peft"])
    report = verify(files, base, weights, "a cat")
    assert {f.kind for f in report.files if f.largest_error <= 1e-6} == {"peft"}
    assert all(f.allowed_error <= 1.1e-3 for f in report.files), "the others are factored within max_error"
    kept = sorted(tmp_path.glob("peft/*/adapter_model.safetensors"))
    read = read_adapter(kept, load_base(tiny_bases[family]))
    assert set(read.dora) == set(weights.dora) == set(adapter.layers())
    for layer, delta in weights.dense.items():
        torch.testing.assert_close(read.delta(layer), delta)
    changed = load_file(kept[-1])
    key = next(k for k in changed if k.endswith("magnitude_vector"))
    save_file({**changed, key: changed[key] * 1.01}, kept[-1], metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="magnitude"):
        verify([f for f in files if f.kind == "peft"], base, weights)


def test_dora_shares_no_layer(tiny_bases: dict[str, Path]) -> None:
    objective = Denoising(str(tiny_bases["sd1"]), [LoRA(use_dora=True), KeyValueDelta()])
    with pytest.raises(UsageError, match="give them different layers"):
        objective.configure_model()
    Denoising(str(tiny_bases["sd1"]), [LoRA(use_dora=True, targets=["attn1.to_q"]), KeyValueDelta()]).configure_model()


# ---- learning rates ----------------------------------------------------------------------------------


def built(path: Path, lr: float | None = 1e-3, **options: Any) -> Denoising:
    factory = torch.optim.AdamW if lr is None else functools.partial(torch.optim.AdamW, lr=lr)
    objective = Denoising(str(path), [LoRA(rank=1, **options)], optimizer=factory)
    objective.configure_model()
    return objective


def test_groups_have_their_rates_and_hold_every_factor_once(tiny_bases: dict[str, Path]) -> None:
    rates = {"mid_block.attentions.0.transformer_blocks.0.attn2.*": 5e-4, "mid_block.*": 1e-4}
    objective = built(tiny_bases["sd1"], lr_ratio=16.0, block_lr=rates, use_dora=True)
    optimizer = objective.configure_optimizers()
    found = {g["name"]: g for g in optimizer.param_groups}
    first, second = (f"lora/{entry}" for entry in rates)
    expected = {"lora": 1e-3, "lora:B": 16e-3, first: 5e-4, f"{first}:B": 8e-3, second: 1e-4, f"{second}:B": 1.6e-3}
    assert {n: g["lr"] for n, g in found.items()} == pytest.approx(expected) and list(found) == list(expected)
    held = [id(p) for g in found.values() for p in g["params"]]
    factors = objective.trained[0].named_factors()
    assert sorted(held) == sorted(id(p) for p in factors.values())
    for name, factor in factors.items():
        mid = "mid_block" in name
        group = first if mid and ".attn2." in name else second if mid else "lora"
        assert any(factor is p for p in found[group + (":B" if name.endswith(":B") else "")]["params"]), name


def test_without_them_there_is_one_group(tiny_bases: dict[str, Path]) -> None:
    objective = built(tiny_bases["sd1"], None)
    (group,) = objective.parameter_groups()
    assert set(group) == {"name", "params"} and group["name"] == "lora"
    assert len(group["params"]) == len(objective.trained[0].named_factors())


def test_a_step_moves_b_by_the_ratio(tiny_bases: dict[str, Path], make_batch: Callable[..., Batch]) -> None:
    """Under plain gradient steps B moves lr_ratio times as far as without it, and A as before."""

    def moved(ratio: float | None) -> dict[str, torch.Tensor]:
        objective = Denoising(
            str(tiny_bases["sd1"]), [LoRA(rank=1, lr_ratio=ratio)], optimizer=functools.partial(torch.optim.SGD, lr=1.0)
        )
        objective.configure_model()
        factors = objective.trained[0].named_factors()
        with torch.no_grad():
            for factor in factors.values():
                factor.fill_(0.01)
        before = objective.trained[0].snapshot()
        optimizer = objective.configure_optimizers()
        objective.training_step(make_batch(objective.built, ["a cat"]), 0).backward()
        optimizer.step()
        return {name: value - before[name] for name, value in objective.trained[0].snapshot().items()}

    plain, plus = moved(None), moved(8.0)
    for name, change in plain.items():
        expected = change * (8 if name.endswith(":B") else 1)
        torch.testing.assert_close(plus[name], expected, rtol=1e-3, atol=1e-8)
    assert any(float(change.abs().max()) > 1e-4 for change in plain.values())


def test_a_resume_with_other_groups_is_refused(tiny_bases: dict[str, Path]) -> None:
    objective = built(tiny_bases["sd1"])
    objective.configure_optimizers()
    checkpoint: dict[str, Any] = {}
    objective.on_save_checkpoint(checkpoint)
    built(tiny_bases["sd1"]).check_resumable(checkpoint)
    with pytest.raises(UsageError, match="parameter groups lora, and now has lora, lora:B"):
        built(tiny_bases["sd1"], lr_ratio=4.0).check_resumable(checkpoint)
