"""Exports come back through stock clients exactly, and damage of any kind is noticed."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_personalize.adapters.key_value_delta import KeyValueDelta
from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.protocol import Adapter, AdapterWeights, LowRank
from lit_personalize.adapters.token_embedding import TokenEmbedding
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.errors import DataError, UsageError, VerificationError
from lit_personalize.export.exporter import export
from lit_personalize.export.inspect import inspect_file
from lit_personalize.export.loading import load_adapter, read_adapter
from lit_personalize.export.verify import adapters_in, exported_of, verify
from lit_personalize.sampling.sampler import SamplingOptions, generate

Train = Callable[[Path, list[Adapter]], tuple[Base, AdapterWeights]]


@pytest.mark.parametrize("family", ["sd1", "sd2-v", "sdxl"])
def test_stock_clients_give_back_what_was_trained(
    tiny_bases: dict[str, Path], train: Train, everything: list[Adapter], tmp_path: Path, family: str
) -> None:
    base, weights = train(tiny_bases[family], everything)
    files = export(weights, tmp_path, base, "run", ["diffusers", "kohya", "peft", "delta"])
    peft, embeddings = (3, 3) if family == "sdxl" else (2, 1)
    assert [f.kind for f in files] == ["diffusers", "kohya", *["peft"] * peft, *["embedding"] * embeddings, "delta"]
    report = verify(files, base, weights, "a photo of a <new1> cat")
    assert sum(f.layers for f in report.files if f.kind == "peft") == len(weights.deltas())
    assert report.picture_difference is not None and report.picture_difference <= 1 / 255 + 1e-6
    by_kind = {f.kind: f for f in report.files}
    assert by_kind["diffusers"].layers == by_kind["kohya"].layers == len(weights.deltas())
    assert by_kind["diffusers"].largest_error <= 1.1e-3


def test_all_of_cross_attention_comes_back_in_the_stock_client(
    tiny_bases: dict[str, Path], train: Train, tmp_path: Path
) -> None:
    """Q, K, V and out of every attn2, whose widths differ; exact on request."""
    base, weights = train(tiny_bases["sd2-v"], [KeyValueDelta("cross"), TokenEmbedding("<new1>", "cat")])
    ends = Counter(layer.rpartition("attn2.")[2] for layer in weights.dense)
    assert ends == {"to_q": 4, "to_k": 4, "to_v": 4, "to_out.0": 4}
    files = export(weights, tmp_path, base, "run", ["diffusers", "kohya", "delta"], max_error=0.0)
    report = verify(files, base, weights, "a <new1> cat")
    assert all(f.layers == 16 and f.largest_error < 2e-6 for f in report.files if f.kind != "embedding")
    assert {f.coverage for f in report.files if f.kind in ("diffusers", "kohya")} == {"16/32"}
    assert report.picture_difference is not None and report.picture_difference <= 1 / 255 + 1e-6


@pytest.mark.parametrize("rule", [{"energy": 0.9}, {"nuclear": 0.6}, {"nuclear": 0.6, "max_rank": 3}])
def test_compressed_deltas_say_what_they_kept(
    tiny_bases: dict[str, Path], train: Train, tmp_path: Path, rule: dict[str, float]
) -> None:
    """The file's own words are what its factors hold, and the stock client gives back the declared error."""
    base, weights = train(tiny_bases["sd1"], [KeyValueDelta()])
    (item,) = export(weights, tmp_path, base, "run", ["diffusers"], **rule)  # type: ignore[arg-type]
    (report,) = verify([item], base, weights).files
    assert 0.1 < report.largest_error <= report.allowed_error
    least = {"energy": 1.0, "nuclear": 1.0}
    for layer, delta in weights.dense.items():
        found, whole = (torch.linalg.svdvals(d.double()) for d in (read_adapter(item.path, base).delta(layer), delta))
        least["energy"] = min(least["energy"], float(found.square().sum() / whole.square().sum()))
        least["nuclear"] = min(least["nuclear"], float(found.sum() / whole.sum()))
    assert f"{least['energy']:.1%} of the energy and {least['nuclear']:.1%} of" in item.kept
    assert inspect_file(item.path)["kept"] == item.kept
    if "max_rank" in rule:
        assert set(report.ranks) == {"3"} and "rank <= 3" in item.kept
    else:
        assert all(least[name] >= share for name, share in rule.items())


@pytest.mark.parametrize("targets", ["attention", "blocks"])
@pytest.mark.parametrize("family", ["sd1", "sd2-v", "sdxl"])
def test_low_rank_adapters_come_back_to_fp32_precision(
    tiny_bases: dict[str, Path], train: Train, tmp_path: Path, family: str, targets: str
) -> None:
    base, weights = train(tiny_bases[family], [LoRA(rank=2, alpha=5.0, targets=targets)])
    report = verify(export(weights, tmp_path, base, "run", ["diffusers", "kohya", "peft"]), base, weights, "a cat")
    assert all(f.largest_error <= 1e-6 and f.allowed_error == 1e-6 for f in report.files)
    kohya = load_file(tmp_path / "run.kohya.safetensors")
    assert {float(t) for k, t in kohya.items() if k.endswith(".alpha")} == {5.0}
    assert not any("lora_lora" in k or "base_layer" in k for k in kohya)


def test_files_of_low_rank_and_token_sample_as_the_live_adapters(
    tiny_bases: dict[str, Path], train: Train, tmp_path: Path
) -> None:
    adapters: list[Adapter] = [LoRA(rank=2, text_encoder=True), TokenEmbedding("<new1>", "cat")]
    base, weights = train(tiny_bases["sdxl"], adapters)
    export(weights, tmp_path, base, "run", ["diffusers"])
    fresh = load_base(tiny_bases["sdxl"])
    loaded = load_adapter(tmp_path, fresh)
    options = SamplingOptions(steps=3)
    live = generate(base, ["a <new1> cat"], [0], adapters, options)
    assert np.abs(generate(fresh, ["a <new1> cat"], [0], [loaded], options).astype(int) - live).max() <= 1


def test_two_changes_of_one_layer_add_up(tiny_bases: dict[str, Path], train: Train, tmp_path: Path) -> None:
    base, weights = train(tiny_bases["sd1"], [LoRA(rank=2, alpha=8.0), KeyValueDelta()])
    verify(export(weights, tmp_path, base, "run"), base, weights)
    layer = next(iter(weights.dense))
    expected = weights.low_rank[layer].delta() + weights.dense[layer]
    torch.testing.assert_close(weights.deltas()[layer], expected)


@pytest.mark.parametrize("kind", ["diffusers", "kohya", "embedding", "delta"])
def test_a_changed_file_fails_verification(
    tiny_bases: dict[str, Path], train: Train, everything: list[Adapter], tmp_path: Path, kind: str
) -> None:
    base, weights = train(tiny_bases["sd1"], everything)
    files = export(weights, tmp_path, base, "run", ["diffusers", "kohya", "delta"])
    item = next(f for f in files if f.kind == kind)
    tensors = load_file(item.path)
    name = next(k for k in tensors if "alpha" not in k)
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, item.path, {"litp.token": "<new1>"} if kind == "embedding" else None)
    with pytest.raises(VerificationError):
        verify([item], base, weights)


def test_half_of_the_keys_fails_verification(tiny_bases: dict[str, Path], train: Train, tmp_path: Path) -> None:
    base, weights = train(tiny_bases["sd1"], [LoRA(rank=2)])
    (item, _) = export(weights, tmp_path, base, "run")
    tensors = load_file(item.path)
    kept = sorted(tensors)[: len(tensors) // 2]
    save_file({k: tensors[k] for k in kept}, item.path)
    with pytest.raises(VerificationError, match="did not load"):
        verify([item], base, weights)


def test_pickles_are_refused_under_any_name(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    base = load_base(tiny_bases["sd1"])
    disguised = tmp_path / "adapter.safetensors"
    disguised.write_bytes(pickle.dumps({"unet": 1}))
    honest = tmp_path / "adapter.bin"
    torch.save({"x": torch.zeros(1)}, honest)
    zipped = tmp_path / "other.safetensors"
    torch.save({"x": torch.zeros(1)}, zipped)
    for path in (disguised, honest, zipped):
        with pytest.raises(DataError, match="is a pickle: loading one can run any code"):
            read_adapter(path, base)


def test_damaged_and_foreign_files_are_refused(tiny_bases: dict[str, Path], train: Train, tmp_path: Path) -> None:
    base, weights = train(tiny_bases["sd1"], [LoRA(rank=2)])
    (item, _) = export(weights, tmp_path, base, "run")
    other = load_base(tiny_bases["sdxl"])
    with pytest.raises(DataError, match="was trained on base sd1"):
        load_adapter(item.path, other)
    with pytest.raises(DataError):
        load_adapter(item.path, other, force=True)
    tensors = load_file(item.path)
    first = next(iter(tensors))
    for change, message in (
        ({first: tensors[first] * float("nan")}, "holds NaN"),
        ({"unet.no.such.layer.lora_A.weight": tensors[first].clone()}, "names no layer of this base"),
        ({"unet.conv_in.weight": tensors[first].clone()}, "is not part of a LoRA file"),
    ):
        save_file({**tensors, **change}, tmp_path / "bad.safetensors")
        with pytest.raises(DataError, match=message):
            read_adapter(tmp_path / "bad.safetensors", base)
    save_file({first: tensors[first]}, tmp_path / "bad.safetensors")
    with pytest.raises(DataError, match="lacks its up factor"):
        read_adapter(tmp_path / "bad.safetensors", base)
    (tmp_path / "bad.safetensors").write_bytes(item.path.read_bytes()[:-10])
    with pytest.raises(DataError, match="not a whole safetensors file"):
        read_adapter(tmp_path / "bad.safetensors", base)
    save_file(tensors, tmp_path / "bad.safetensors", {"litp.format_version": "99"})
    with pytest.raises(DataError, match="format version 99"):
        read_adapter(tmp_path / "bad.safetensors", base)
    with pytest.raises(DataError, match="does not exist"):
        read_adapter(tmp_path / "nothing.safetensors", base)


def test_reading_gives_what_was_written(
    tiny_bases: dict[str, Path], train: Train, everything: list[Adapter], tmp_path: Path
) -> None:
    base, weights = train(tiny_bases["sdxl"], everything)
    for item in export(weights, tmp_path, base, "run", ["kohya", "delta"]):
        found = read_adapter(item.path, base)
        for layer, delta in found.deltas().items():
            wanted = weights.dense[layer] if item.kind == "delta" else weights.deltas()[layer]
            assert float((delta - wanted).norm() / wanted.norm()) <= (1e-6 if item.kind == "delta" else 1.1e-3)
        for token, rows in found.tokens.items():
            assert all(torch.equal(a, b) for a, b in zip(rows, weights.tokens[token], strict=True))


def test_a_peft_directory_is_read(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig, PeftModel, get_peft_model

    unet = UNet2DConditionModel.from_pretrained(tiny_bases["sd1"] / "unet")
    model = get_peft_model(unet, LoraConfig(r=2, lora_alpha=7, target_modules=["attn2.to_k"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "peft")
    found = read_adapter(tmp_path / "peft", load_base(tiny_bases["sd1"]))
    name, low_rank = next(iter(found.low_rank.items()))
    assert low_rank.alpha == 7.0
    unet = UNet2DConditionModel.from_pretrained(tiny_bases["sd1"] / "unet")
    again = PeftModel.from_pretrained(unet, tmp_path / "peft")
    layer = again.base_model.model.get_submodule(name.removeprefix("unet."))
    torch.testing.assert_close(low_rank.delta(), layer.get_delta_weight("default").detach())


def test_unknown_format_is_refused(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown export format 'bin'"):
        export(AdapterWeights(), tmp_path, load_base(tiny_bases["sd1"]), "run", ["bin"])


def test_concatenated_ranks_are_the_exact_sum() -> None:
    torch.manual_seed(0)
    parts = [LowRank(torch.randn(r, 5), torch.randn(4, r), a) for r, a in ((1, 3.0), (2, 1.0))]
    torch.testing.assert_close(parts[0].concatenate(parts[1]).delta(), parts[0].delta() + parts[1].delta())


def test_a_folder_is_verified_and_read_without_knowing_what_was_trained(
    tiny_bases: dict[str, Path], train: Train, everything: list[Adapter], tmp_path: Path
) -> None:
    base, weights = train(tiny_bases["sdxl"], everything)
    files = export(weights, tmp_path, base, "run", ["diffusers", "kohya", "peft", "delta"])
    found = exported_of(adapters_in(tmp_path))
    assert {(f.name, f.kind, f.encoder) for f in found} == {(f.name, f.kind, f.encoder) for f in files}
    report = verify(found, base, prompt="a <new1> cat")
    assert len({f.file for f in report.files}) == len(files) and report.picture_difference is not None
    components = next(f.components for f in report.files if f.kind == "kohya")
    assert components == {c: sum(n.startswith(f"{c}.") for n in weights.layers()) for c in components}
    assert set(components) == {"unet", "text_encoder", "text_encoder_2"}


@pytest.mark.parametrize("formats", [["kohya"], ["peft"], ["delta"]])
def test_a_folder_of_any_format_is_found(
    tiny_bases: dict[str, Path], train: Train, tmp_path: Path, formats: list[str]
) -> None:
    adapters: list[Adapter] = [KeyValueDelta(), TokenEmbedding("<new1>", "cat")]
    if formats == ["peft"]:
        adapters.append(LoRA(rank=2, targets=["attn1.to_q"], text_encoder=True))
    base, weights = train(tiny_bases["sdxl"], adapters)
    export(weights, tmp_path, base, "my run", formats)
    found = read_adapter(tmp_path, base)
    assert set(found.layers()) == set(weights.layers()) and set(found.tokens) == {"<new1>"}
    for layer in found.layers():
        assert float((found.delta(layer) - weights.delta(layer)).norm() / weights.delta(layer).norm()) < 1.1e-3
    if formats == ["delta"]:
        (tmp_path / "other.delta.safetensors").write_bytes((tmp_path / "my-run.delta.safetensors").read_bytes())
        with pytest.raises(DataError, match="holds 2 files"):
            read_adapter(tmp_path, base)


def test_files_of_different_steps_are_not_mixed(tiny_bases: dict[str, Path], train: Train, tmp_path: Path) -> None:
    base, weights = train(tiny_bases["sd1"], [LoRA(rank=2), TokenEmbedding("<new1>", "cat")])
    export(weights, tmp_path, base, "run", ["diffusers"], {"steps": 2})
    export(weights, tmp_path, base, "run", ["kohya"], {"steps": 4})
    with pytest.raises(DataError, match="of step 2, learned_embeds.safetensors of step 4"):
        read_adapter(tmp_path, base)
    assert set(read_adapter(tmp_path, base, force=True).tokens) == {"<new1>"}
    export(weights, tmp_path, base, "run", ["diffusers"], {"steps": 4})
    assert read_adapter(tmp_path, base).low_rank
