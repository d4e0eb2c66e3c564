"""The difference of two models comes back as what was put in, and what LoRA cannot carry is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.adapters.token_embedding import TokenEmbedding
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.errors import DataError
from lit_personalize.export.pipeline import write_pipeline
from lit_personalize.merging.extract import difference
from lit_personalize.merging.truncation import Cut, Factors, truncate, truncate_dense


def trained(base: Base) -> AdapterWeights:
    """A LoRA of rank 2 on UNet and text encoders, and tokens of one and of three rows."""
    weights = AdapterWeights()
    for adapter in (LoRA(rank=2, targets="blocks", text_encoder=True), TokenEmbedding("<new1>", "cat", vectors=3),
                    TokenEmbedding("<new2>", "dog")):  # fmt: skip
        adapter.attach(base)
        with torch.no_grad():
            for factor in adapter.named_factors().values():
                factor.add_(0.1 * torch.randn(factor.shape))
        weights = weights.merge(adapter.export_weights())
    return weights


def test_a_merged_pipeline_gives_its_adapter_back(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    weights = trained(load_base(tiny_bases["sdxl"]))
    base = load_base(tiny_bases["sdxl"])
    tuned = load_base(write_pipeline(weights, base, tmp_path / "tuned"))
    found = difference(base, tuned, Cut(energy=0.999999))
    assert set(found.weights.layers()) == set(weights.layers()) and not found.left
    for layer in weights.layers():
        wanted = weights.delta(layer)
        assert found.weights.low_rank[layer].rank == 2
        assert float((found.weights.delta(layer) - wanted).norm() / wanted.norm()) < 1e-4  # W0 + ΔW is fp32
    assert {t: [r.shape for r in rows] for t, rows in found.weights.tokens.items()} == {
        t: [r.shape for r in rows] for t, rows in weights.tokens.items()
    }
    for token, rows in weights.tokens.items():
        assert all(map(torch.equal, found.weights.tokens[token], rows))
    assert found.energy.share > 0.99999


def test_the_rank_keeps_what_it_says_and_the_rest_is_told(tiny_bases: dict[str, Path]) -> None:
    base, tuned = load_base(tiny_bases["sd1"]), load_base(tiny_bases["sd1"])
    changes, carried, rest = {}, 0.0, {"norms": 0.0, "biases": 0.0, "embeddings": 0.0, "vae": 0.0}
    with torch.no_grad():
        for path, kind in (
            ("unet.conv_in.weight", ""), ("unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight", ""),
            ("unet.conv_norm_out.weight", "norms"), ("unet.conv_in.bias", "biases"),
            ("text_encoder.text_model.embeddings.token_embedding.weight", "embeddings"),
            ("vae.decoder.conv_in.weight", "vae"),
        ):  # fmt: skip
            component, _, name = path.partition(".")
            state = tuned.components()[component].state_dict()
            weight = state[name] if name in state else state[name.removeprefix("text_model.")]
            delta = 0.1 * torch.randn(weight.shape)
            before = weight.double()
            weight.add_(delta)
            delta = weight.double() - before
            energy = float(delta.square().sum())
            if kind:
                rest[kind] += energy
            else:
                carried += energy
                changes[path.removesuffix(".weight")] = delta
    found = difference(base, tuned, Cut(rank=3))
    assert set(found.weights.layers()) == set(changes)
    for layer, delta in changes.items():
        matrix = delta.flatten(1)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        torch.testing.assert_close(found.weights.delta(layer).double(), u[:, :3] * s[:3] @ vh[:3], atol=1e-6, rtol=1e-5)
        assert found.energy.layers[layer] == pytest.approx(float(s[:3].square().sum() / s.square().sum()), rel=1e-9)
    assert found.energy.exact == pytest.approx(carried, rel=1e-9)
    whole = carried + sum(rest.values())
    assert {kind: left.share for kind, left in found.left.items()} == pytest.approx(
        {kind: energy / whole for kind, energy in rest.items()}, rel=1e-6
    )
    assert str(found.left["norms"]).startswith("1 tensors, ")


def test_less_precision_is_no_change_and_the_same_model_no_difference(tiny_bases: dict[str, Path]) -> None:
    base, tuned = load_base(tiny_bases["sd1"]), load_base(tiny_bases["sd1"], dtype="float16").to(torch.float32)
    with pytest.raises(DataError, match="there is no difference to extract"):
        difference(base, tuned)
    with torch.no_grad():
        tuned.unet.conv_out.weight.add_(0.1)
    assert difference(base, tuned).weights.layers() == ["unet.conv_out"]


def test_another_architecture_is_refused(tiny_bases: dict[str, Path]) -> None:
    base = load_base(tiny_bases["sd1"])
    with pytest.raises(DataError, match="was tuned from another base: its unet..* is"):
        difference(base, load_base(tiny_bases["sd2"]))


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (12, 12)])
def test_both_ways_to_truncate_agree(shape: tuple[int, int]) -> None:
    up, down = torch.randn(shape[0], 5, dtype=torch.double), torch.randn(5, shape[1], dtype=torch.double)
    for cut in (Cut(), Cut(rank=2), Cut(energy=0.7)):
        thin, dense = truncate(Factors(up, down), cut), truncate_dense(up @ down, cut)
        assert thin.rank == dense.rank
        torch.testing.assert_close(thin.delta(), dense.delta(), atol=1e-9, rtol=1e-9)
        assert (thin.energy, thin.kept) == pytest.approx((dense.energy, dense.kept), rel=1e-9)
        balance = thin.up.norm() / thin.down.norm(), dense.up.norm() / dense.down.norm()
        assert balance == pytest.approx((1, 1), rel=1e-6)
