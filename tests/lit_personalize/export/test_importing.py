"""Adapters of other programs come in with the numbers that they hold, and never with their code."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_personalize.adapters.loaded import LoadedAdapter
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.cli.main import main
from lit_personalize.errors import DataError, UsageError
from lit_personalize.export import keys
from lit_personalize.export.importing import import_files, read_foreign
from lit_personalize.export.inspect import inspect_file
from lit_personalize.export.loading import read_adapter

KEY_VALUE = ("attn2.to_k.weight", "attn2.to_v.weight")
COMPVIS = {
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.attentions.0": "middle_block.1",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
}
"""Of the tiny UNet, counted by hand: a convolution, a stage, a downsampler, a stage with attention."""


def tuned_unet(path: Path, ends: tuple[str, ...] = KEY_VALUE) -> tuple[Any, dict[str, Tensor]]:
    """A stock UNet with moved weights, and those by name: what the original tool trains and saves."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(path / "unet")
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        moved = {n: p for n, p in unet.named_parameters() if n.endswith(ends)}
        for parameter in moved.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draws))
    return unet, {name: p.detach().clone() for name, p in moved.items()}


def assert_predicts_as(unet: Any, base: Base, weights: AdapterWeights) -> None:
    """Our base with the weights that were read and the stock UNet with moved weights say the same."""
    adapter = LoadedAdapter(weights)
    adapter.attach(base)
    told = base.condition(["a photo of a cat"])
    z, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2)), torch.tensor([400])
    extra: dict[str, Any] = {}
    if told.pooled is not None:
        extra = {"added_cond_kwargs": {"text_embeds": told.pooled, "time_ids": told.time_ids}}
    with torch.no_grad():
        theirs = unet(z, t, told.states, return_dict=False, **extra)[0]
    torch.testing.assert_close(base.predict(z, t, told, [adapter]), theirs, atol=1e-5, rtol=1e-4)
    assert float((base.predict(z, t, told, None) - theirs).abs().max()) > 1e-3, "nothing was changed"


def test_a_delta_file_of_the_original_tool(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    unet, moved = tuned_unet(tiny_bases["sd1"])
    row = torch.randn(32)
    torch.save({"unet": moved, "modifier_token": {"<new1>": row}}, tmp_path / "delta.bin")
    base = load_base(tiny_bases["sd1"])
    report = import_files([tmp_path / "delta.bin"], base, tmp_path / "out")
    assert report.layers == {"unet": len(moved)} and report.tokens == ["<new1>"] and report.largest_error == 0
    found = read_adapter(tmp_path / "out", base)
    shares = []
    for name, weight in moved.items():
        own = base.unet.get_parameter(name)
        torch.testing.assert_close(own + found.dense[f"unet.{name.removesuffix('.weight')}"], weight)
        shares.append(float((weight - own).norm() / own.norm()))
    assert report.largest_change == pytest.approx(max(shares), rel=1e-4)
    assert torch.equal(found.tokens["<new1>"][0][0], row)
    inspected = inspect_file(tmp_path / "out" / "out.delta.safetensors")
    assert inspected["format"] == "dense delta" and inspected["layers"] == len(moved)
    assert inspected["tokens"] == ["<new1>"] and '"delta.bin"' in inspected["details"]
    assert_predicts_as(unet, base, found)


def test_a_delta_file_of_sdxl_has_two_rows_a_token(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    unet, moved = tuned_unet(tiny_bases["sdxl"])
    rows = [torch.randn(32), torch.randn(48)]
    torch.save({"unet": moved, "modifier_token": {"<new1>": rows, "<new2>": rows}}, tmp_path / "delta.bin")
    base = load_base(tiny_bases["sdxl"])
    found = read_foreign(tmp_path / "delta.bin", base)
    assert list(found.tokens) == ["<new1>", "<new2>"] and len(found.dense) == len(moved)
    assert all(torch.equal(a[0], b) for a, b in zip(found.tokens["<new2>"], rows, strict=True))
    assert_predicts_as(unet, base, found)


def test_all_of_cross_attention_brings_its_biases(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    ends = (*KEY_VALUE, "attn2.to_q.weight", "attn2.to_out.0.weight", "attn2.to_out.0.bias")
    unet, moved = tuned_unet(tiny_bases["sd1"], ends)
    torch.save({"unet": moved}, tmp_path / "delta.bin")
    base = load_base(tiny_bases["sd1"])
    found = read_foreign(tmp_path / "delta.bin", base)
    assert len(found.dense) == 16 and len(found.parameters) == 4 and not found.tokens
    assert_predicts_as(unet, base, found)


def test_a_checkpoint_of_the_first_code_has_the_original_block_names(
    tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    unet, moved = tuned_unet(tiny_bases["sd1"])
    named = {}
    for name, weight in moved.items():
        place = next(ours for ours in COMPVIS if name.startswith(ours))
        named["model.diffusion_model." + COMPVIS[place] + name.removeprefix(place)] = weight
    assert len(named) == 8
    rows = torch.randn(2, 32)
    torch.save({"state_dict": {**named, "embed": rows}}, tmp_path / "delta_epoch=000004.ckpt")
    base = load_base(tiny_bases["sd1"])
    found = read_foreign(tmp_path / "delta_epoch=000004.ckpt", base)
    assert len(found.dense) == 8
    assert torch.equal(found.tokens["<new1>"][0], rows[:1]) and torch.equal(found.tokens["<new2>"][0], rows[1:])
    assert_predicts_as(unet, base, found)


def test_block_names_of_stable_diffusion_are_those_of_the_specification() -> None:
    """Sixteen transformers of SD1: input blocks 1, 2, 4, 5, 7, 8, the middle, output blocks 3 to 11."""
    expected = {f"down_blocks.{i // 3}.attentions.{0 if i in (1, 4, 7) else 1}": f"input_blocks_{i}_1"
                for i in (1, 2, 4, 5, 7, 8)}  # fmt: skip
    expected |= {f"up_blocks.{i // 3}.attentions.{i % 3}": f"output_blocks_{i}_1" for i in range(3, 12)}
    expected["mid_block.attentions.0"] = "middle_block_1"
    assert len(expected) == 16
    for ours, theirs in expected.items():
        assert keys.original(f"unet.{ours}.proj_in", 2) == f"lora_unet_{theirs}_proj_in"


def test_compressed_deltas_are_low_rank_and_may_be_of_rank_zero(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """u·v is added to the base's weight; the original rule can keep nothing of a layer."""
    unet, moved = tuned_unet(tiny_bases["sd1"])
    base = load_base(tiny_bases["sd1"])
    packed, empty = {}, next(iter(moved))
    for name, weight in moved.items():
        own = base.unet.get_parameter(name)
        u, s, v = torch.linalg.svd(weight - own, full_matrices=False)
        keep = 0 if name == empty else 5
        packed[name] = {"u": u[:, :keep] * s[:keep], "v": v[:keep]}
        with torch.no_grad():
            unet.get_parameter(name).copy_(own + packed[name]["u"] @ packed[name]["v"])
    torch.save({"unet": packed, "modifier_token": {"<new1>": torch.randn(32)}}, tmp_path / "compressed.bin")
    report = import_files([tmp_path / "compressed.bin"], base, tmp_path / "out", ["<cat>"])
    assert report.layers == {"unet": len(moved) - 1} and report.largest_error < 1e-6 and report.tokens == ["<cat>"]
    inspected = inspect_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert inspected["ranks"] == {"5": len(moved) - 1} and inspected["base_fingerprint"] == base.fingerprint
    assert_predicts_as(unet, base, read_adapter(tmp_path / "out", base))


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("faces", [False, True])
def test_weights_that_diffusers_saved(tiny_bases: dict[str, Path], tmp_path: Path, safe: bool, faces: bool) -> None:
    """Written by diffusers itself: every processor by its name, with weights for other projections."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor

    unet = UNet2DConditionModel.from_pretrained(tiny_bases["sd1"] / "unet")
    torch.manual_seed(0)
    processors: dict[str, Any] = {}
    for name in unet.attn_processors:
        attention = unet.get_submodule(name.removesuffix(".processor"))
        processors[name] = CustomDiffusionAttnProcessor(train_kv=False, train_q_out=False)
        if name.endswith("attn2.processor"):
            processors[name] = own = CustomDiffusionAttnProcessor(
                train_q_out=faces, hidden_size=attention.to_q.in_features, cross_attention_dim=32
            )
            trained = {own.to_k_custom_diffusion: attention.to_k, own.to_v_custom_diffusion: attention.to_v}
            if faces:
                trained |= {own.to_q_custom_diffusion: attention.to_q}
                trained |= {own.to_out_custom_diffusion[0]: attention.to_out[0]}
            with torch.no_grad():
                for layer, start in trained.items():
                    layer.weight.copy_(start.weight + 0.1 * torch.randn_like(start.weight))
                    if layer.bias is not None:
                        layer.bias.copy_(start.bias + 0.1 * torch.randn_like(start.bias))
    unet.set_attn_processor(processors)
    unet.save_attn_procs(tmp_path, safe_serialization=safe)
    row = torch.randn(32)
    torch.save({"<new1>": row}, tmp_path / "<new1>.bin")
    weights = tmp_path / f"pytorch_custom_diffusion_weights.{'safetensors' if safe else 'bin'}"
    if not safe:
        assert any(value == {} for value in torch.load(weights).values()), "self-attention is listed without weights"
    base = load_base(tiny_bases["sd1"])
    found = read_foreign(weights, base).merge(read_foreign(tmp_path / "<new1>.bin", base))
    assert len(found.dense) == (16 if faces else 8) and len(found.parameters) == (4 if faces else 0)
    assert torch.equal(found.tokens["<new1>"][0][0], row)
    assert_predicts_as(unet, base, found)


def test_a_text_encoder_brings_only_what_changed(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    from transformers import CLIPTextModel

    _, moved = tuned_unet(tiny_bases["sd1"])
    state = CLIPTextModel.from_pretrained(tiny_bases["sd1"] / "text_encoder").half().state_dict()
    state = {f"text_model.{n.removeprefix('text_model.')}": t for n, t in state.items()}
    changed = next(name for name in state if name.endswith("fc1.weight"))
    state[changed] = state[changed] + 1
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save({"unet": moved, "text_encoder": state}, tmp_path / "delta.bin")
    found = read_foreign(tmp_path / "delta.bin", load_base(tiny_bases["sd1"]))
    assert len(found.dense) == len(moved) + 1 and not found.parameters
    (layer,) = set(found.dense) - {f"unet.{name.removesuffix('.weight')}" for name in moved}
    assert changed.removeprefix("text_model.") == layer.removeprefix("text_encoder.") + ".weight"
    torch.testing.assert_close(found.dense[layer], torch.ones_like(found.dense[layer]), rtol=0, atol=1e-2)


class _Shell:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("kind", ["archive", "legacy", "bare", "disguised"])
def test_a_pickle_with_code_is_refused_and_nothing_runs(
    tiny_bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    mark, file = tmp_path / "it-ran", tmp_path / ("a.safetensors" if kind == "disguised" else "delta.bin")
    content = {"unet": {"a.weight": torch.ones(2)}, "modifier_token": _Shell(mark)}
    if kind == "bare":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind != "legacy")
    given = ["import", str(file), "--base", str(tiny_bases["sd1"]), "-o", str(tmp_path / "out")]
    assert main(given) == 3
    message = capsys.readouterr().err
    what = "holds more than weights" if kind == "bare" else f"asks for {os.system.__module__}.system"
    assert f"{file} {what}: loading it could run code" in message and message.count("\n") == 1
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused_by_name(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    base = load_base(tiny_bases["sd1"])
    _, moved = tuned_unet(tiny_bases["sd1"])
    name = next(iter(moved))
    untouched = {n: base.unet.get_parameter(n).detach().clone().half() for n in moved}
    file = tmp_path / "delta.bin"
    cases: list[tuple[Any, str]] = [
        ({"unet": {**moved, "down_blocks.9.attn2.to_k.weight": torch.ones(2, 2)}}, "names nothing of base"),
        ({"unet": {**moved, name: torch.ones(3, 3)}}, "the base has"),
        ({"unet": {**moved, name: moved[name] * float("nan")}}, "NaN"),
        ({"unet": {**moved, name: {"u": torch.ones(2, 2), "v": torch.ones(3, 2)}}}, "times"),
        ({"unet": {**moved, name: {"u": torch.ones(2, 2)}}}, "compressed layers hold u and v"),
        ({"unet": moved, "optimizer": {}}, "'optimizer' is no part of a delta file"),
        ({"unet": untouched}, "changes nothing"),
        ({"unet": moved, "modifier_token": {"<new1>": torch.ones(7)}}, "token <new1> has rows"),
        ({"state_dict": {"model.diffusion_model.time_embed.0.weight": torch.ones(2)}}, "names nothing of base"),
        ({"state_dict": {"embed": torch.tensor(1.0)}}, "embed has shape"),
        ({"epoch": 3}, "'epoch' is no tensor"),
        ([1, 2], "holds no weights by name"),
        ({}, "holds no tensor"),
    ]
    for content, message in cases:
        torch.save(content, file)
        with pytest.raises(DataError, match=message):
            import_files([file], base, tmp_path / "out")
    torch.save({"unet": moved}, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match="not a whole file of torch.save"):
        import_files([file], base, tmp_path / "out")
    file.write_bytes(b"\x80\x02not a pickle at all")
    with pytest.raises(DataError, match="delta.bin"):
        import_files([file], base, tmp_path / "out")
    file.write_text("hello")
    with pytest.raises(DataError, match="neither a safetensors file nor"):
        import_files([file], base, tmp_path / "out")
    with pytest.raises(DataError, match="does not exist"):
        import_files([tmp_path / "no.bin"], base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    torch.save({"unet": moved}, file)
    with pytest.raises(DataError, match="import it by itself"):
        import_files([file, file], base, tmp_path / "out")
    with pytest.raises(UsageError, match="1 names for the tokens"):
        import_files([file], base, tmp_path / "out", ["<new1>"])
    with pytest.raises(UsageError, match="not an empty folder"):
        import_files([file], base, tmp_path)


def test_other_pickles_of_weights_come_in_too(
    tiny_bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A LoRA that was saved as .bin; what comes out verifies, and a file for another base does not come in."""
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    factors = {f"{layer}.lora_A.weight": torch.randn(2, 32), f"{layer}.lora_B.weight": torch.randn(64, 2)}
    torch.save(factors, tmp_path / "lora.bin")
    out = tmp_path / "out"
    given = ["--base", str(tiny_bases["sd1"]), "--json", "-o"]
    assert main(["import", str(tmp_path / "lora.bin"), *given, str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["files"] == [str(out / "pytorch_lora_weights.safetensors")] and report["layers"] == {"unet": 1}
    assert torch.equal(load_file(report["files"][0])[f"{layer}.lora_A.weight"], factors[f"{layer}.lora_A.weight"])
    assert main(["verify", *report["files"], "--base", str(tiny_bases["sd1"])]) == 0
    save_file(factors, tmp_path / "theirs.safetensors", {"litp.base_fingerprint": "another"})
    assert main(["import", str(tmp_path / "theirs.safetensors"), *given, str(tmp_path / "more")]) == 3
    assert "was trained on base" in capsys.readouterr().err
