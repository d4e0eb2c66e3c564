"""Between two adapters: exact ends, linear in α, norms of rows, and the stock client's own interpolation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lit_personalize.adapters.key_value_delta import KeyValueDelta
from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.protocol import Adapter, AdapterWeights
from lit_personalize.adapters.token_embedding import TokenEmbedding
from lit_personalize.backbones.loading import load_base
from lit_personalize.cli.main import main
from lit_personalize.errors import DataError, UsageError
from lit_personalize.export import keys
from lit_personalize.export.exporter import export
from lit_personalize.export.loading import read_adapter
from lit_personalize.export.stock import stock_pipeline
from lit_personalize.merging.interpolation import interpolate


def learned(path: Path, seed: int, token: str, *adapters: Adapter) -> AdapterWeights:
    """Weights of adapters whose factors are drawn at random, with one token."""
    base = load_base(path)
    weights = AdapterWeights()
    draws = torch.Generator().manual_seed(seed)
    for adapter in (TokenEmbedding(token, "cat"), *adapters):
        adapter.attach(base, seed)
        with torch.no_grad():
            for parameter in adapter.factors.values():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draws))
        weights = weights.merge(adapter.export_weights())
    return weights


@pytest.fixture
def pair(tiny_bases: dict[str, Path]) -> tuple[AdapterWeights, AdapterWeights]:
    """LoRA of rank 2 on attention with alpha 4, and of rank 3 on K and V; tokens <new1> and <new2>."""
    path = tiny_bases["sdxl"]
    first = learned(path, 1, "<new1>", LoRA(rank=2, alpha=4.0))
    return first, learned(path, 2, "<new2>", LoRA(rank=3, targets="key_value"))


def test_both_ends_are_the_adapters_bit_for_bit(pair: tuple[AdapterWeights, AdapterWeights]) -> None:
    for alpha, wanted in zip((0.0, 1.0), pair, strict=True):
        found = interpolate(*pair, alpha, "<mix>")
        assert found.low_rank.keys() == wanted.low_rank.keys()
        for layer, factors in wanted.low_rank.items():
            own = found.low_rank[layer]
            assert torch.equal(own.down, factors.down) and torch.equal(own.up, factors.up)
            assert own.alpha == factors.alpha
        (rows,), (original,) = found.tokens.values(), wanted.tokens.values()
        assert list(found.tokens) == ["<mix>"]
        assert len(rows) == 2 and all(map(torch.equal, rows, original))


def test_changes_are_linear_and_rows_have_the_mixed_norm(pair: tuple[AdapterWeights, AdapterWeights]) -> None:
    first, second = pair
    found = interpolate(first, second, 0.3)
    for layer in found.layers():
        delta = sum(share * own.delta(layer) for share, own in ((0.7, first), (0.3, second)) if layer in own.low_rank)
        torch.testing.assert_close(found.delta(layer), delta, atol=1e-6, rtol=1e-5)
    assert {f.rank for f in found.low_rank.values()} == {2, 5}
    for rows, a, b in zip(found.tokens["<new1>"], first.tokens["<new1>"], second.tokens["<new2>"], strict=True):
        torch.testing.assert_close(rows.norm(dim=1), 0.7 * a.norm(dim=1) + 0.3 * b.norm(dim=1))
        line = 0.7 * a + 0.3 * b
        torch.testing.assert_close(rows / rows.norm(), line / line.norm())
        assert float(line.norm()) < 0.95 * float(rows.norm()), "the straight mixture is shorter"


def test_dense_changes_are_mixed_and_lone_ones_fade(tiny_bases: dict[str, Path]) -> None:
    path = tiny_bases["sd1"]
    first, second = learned(path, 1, "<a>", KeyValueDelta("cross")), learned(path, 2, "<a>", KeyValueDelta())
    found = interpolate(first, second, 0.25)
    assert list(found.tokens) == ["<a>"] and found.dense.keys() == first.dense.keys()
    for layer, delta in found.dense.items():
        wanted = 0.75 * first.dense[layer] + (0.25 * second.dense[layer] if layer in second.dense else 0)
        torch.testing.assert_close(delta, wanted)
    assert interpolate(first, second, 1.0).dense.keys() == second.dense.keys()


def test_what_does_not_pair_up_is_refused(pair: tuple[AdapterWeights, AdapterWeights]) -> None:
    first, second = pair
    with pytest.raises(UsageError, match="in \\[0, 1\\], not 1.5"):
        interpolate(first, second, 1.5)
    with pytest.raises(DataError, match="<new1> and none do not pair up"):
        interpolate(first, AdapterWeights(second.low_rank), 0.5)
    with pytest.raises(DataError, match=r"rows of shapes \[\(1, 32\), \(1, 48\)\] and \[\(2, 32\)"):
        two = {"<new2>": [torch.cat([rows, rows]) for rows in second.tokens["<new2>"]]}
        interpolate(first, AdapterWeights(tokens=two), 0.5)


def test_the_verb_writes_what_set_adapters_does(
    pair: tuple[AdapterWeights, AdapterWeights], tiny_bases: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """ΔW of the files = the stock client's weighted adapters; the rows come back from the files."""
    base = load_base(tiny_bases["sdxl"])
    pipe = stock_pipeline(base)
    for name, weights in zip("ab", pair, strict=True):
        export(weights, tmp_path / name, base, name, ["diffusers"])
        pipe.load_lora_weights(tmp_path / name, weight_name="pytorch_lora_weights.safetensors", adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.6, 0.4])
    given = ["merge", "interpolate", str(tmp_path / "a"), str(tmp_path / "b"), "--base", str(tiny_bases["sdxl"])]
    given += ["--alpha", "0.4", "--token", "<mix>", "--device", "cpu", "--json", "-o"]
    assert main([*given, str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == ["<mix>"]
    found = read_adapter(tmp_path / "out", base)
    client = 0
    for path, module in pipe.unet.named_modules():
        if hasattr(module, "lora_A") and module.lora_A:
            client += 1
            delta = sum(module.scaling[n] * (module.lora_B[n].weight @ module.lora_A[n].weight) for n in module.lora_A)
            layer = f"unet.{path}"
            torch.testing.assert_close(found.delta(layer), delta.detach(), atol=1e-6, rtol=1e-5)
            assert keys.split(layer)[0] == "unet"
    assert client == len(found.layers()) > 0
    wanted = interpolate(*pair, 0.4, "<mix>").tokens["<mix>"]
    for rows, own in zip(found.tokens["<mix>"], wanted, strict=True):
        torch.testing.assert_close(rows, own, atol=1e-6, rtol=1e-5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").touch()
    assert main([*given, str(tmp_path / "full")]) == 2
    assert "holds other files" in capsys.readouterr().err
