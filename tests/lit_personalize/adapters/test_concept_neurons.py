"""Concept neurons: the score is the first-order gain, planted neurons are found, masks unite and come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_personalize.adapters.concept_neurons import ConceptNeurons, select_neurons, shut_change
from lit_personalize.adapters.loaded import LoadedAdapter
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.errors import DataError, UsageError
from lit_personalize.export.exporter import export
from lit_personalize.export.inspect import inspect_file
from lit_personalize.export.loading import load_adapter, read_adapter
from lit_personalize.export.verify import exported_of, verify

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def module_of(base: Base, layer: str = LAYER) -> Any:
    return base.unet.get_submodule(layer.removeprefix("unet."))


def predict(base: Base) -> torch.Tensor:
    z = torch.randn(1, base.latent_channels, 16, 16, generator=torch.Generator().manual_seed(3))
    return base.predict_active(z, torch.tensor([400]), base.condition(["a photo of a cat"]))


def scored(path: Path, seed: int, share: float = 0.1) -> tuple[Base, AdapterWeights]:
    """Neurons of random scores."""
    base = load_base(path)
    adapter = ConceptNeurons(share=share)
    adapter.attach(base)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in adapter.named_factors().values():
            factor.copy_(torch.randn(factor.shape, generator=draws))
        adapter.refresh(base.dtype)
    return base, adapter.export_weights()


def test_a_step_of_sgd_leaves_the_score_and_the_score_is_the_gain(tiny_bases: dict[str, Path]) -> None:
    rho, base = 2e-5, load_base(tiny_bases["sd1"]).double()
    adapter = ConceptNeurons(share=None, threshold=0.0)
    adapter.attach(base)
    adapter.refresh(torch.float64)
    z = torch.randn(1, base.latent_channels, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    states = base.condition(["a photo of a cat"]).states.detach()

    def loss() -> torch.Tensor:
        return (base.unet(z, 400, states).sample - z).square().sum()

    before = loss()
    before.backward()
    torch.optim.SGD(adapter.factors.values(), lr=rho).step()
    weight = module_of(base)._parameters["weight"].requires_grad_()
    with base.only([]):
        (gradient,) = torch.autograd.grad(loss(), weight)
        score = (weight * gradient).detach()
        torch.testing.assert_close(-adapter.factor(LAYER).detach(), (rho * score).float(), rtol=1e-4, atol=1e-12)
        place = score.abs().flatten().topk(3).indices
        for index in place:
            with torch.no_grad():
                kept = weight.flatten()[index].clone()
                weight.view(-1)[index] = 0.99 * kept
                gained = before - loss()
                weight.view(-1)[index] = kept
            assert float(gained) == pytest.approx(0.01 * float(score.flatten()[index]), rel=0.05)


def test_planted_neurons_are_found(tiny_bases: dict[str, Path]) -> None:
    """K = K_clean + a sparse disturbance; a loss that wants K_clean shuts off the disturbance and nothing else."""
    base, draws = load_base(tiny_bases["sd1"]), torch.Generator().manual_seed(0)
    weight = module_of(base)._parameters["weight"]
    planted = torch.rand(weight.shape, generator=draws) < 0.05
    clean = weight.detach() * ~planted
    with torch.no_grad():
        weight.copy_(clean + planted * torch.randn(weight.shape, generator=draws))
    adapter = ConceptNeurons(share=None, threshold=0.02)
    adapter.attach(base)
    optimizer = torch.optim.SGD(adapter.factors.values(), lr=0.01)
    for _ in range(30):
        adapter.refresh(base.dtype)
        x = torch.randn(64, weight.shape[1], generator=draws)
        optimizer.zero_grad()
        (module_of(base)(x) - x @ clean.T).square().sum(1).mean().backward()
        optimizer.step()
    found = torch.zeros_like(planted)
    found.view(-1)[adapter.neurons()[LAYER].long()] = True
    assert set(adapter.neurons()) == {LAYER}
    hits = (found & planted).sum()
    assert hits / found.sum() > 0.95 and hits / planted.sum() > 0.8
    with torch.no_grad():
        adapter.refresh(base.dtype)  # as a sampler does
        assert torch.equal(module_of(base).weight == 0, found | (weight == 0))


def test_shares_and_thresholds() -> None:
    scores = {"a": torch.tensor([[4.0, -9.0], [1.0, 2.0]]), "b": torch.tensor([[3.0, 0.0]])}
    assert {k: v.tolist() for k, v in select_neurons(scores, share=0.5).items()} == {"a": [0, 3], "b": [0]}
    assert {k: v.tolist() for k, v in select_neurons(scores, threshold=3.5).items()} == {"a": [0]}
    everything = select_neurons(scores, share=1.0)
    assert {k: v.tolist() for k, v in everything.items()} == {"a": [0, 2, 3], "b": [0]}, "only what helps"
    assert everything["a"].dtype == torch.int32
    for wrong in ({"share": 0.1, "threshold": 1.0}, {}, {"share": 1.5}, {"threshold": -1.0}):
        with pytest.raises(UsageError):
            select_neurons(scores, **wrong)


def test_starts_as_the_base_and_switches_exactly(tiny_bases: dict[str, Path]) -> None:
    base = load_base(tiny_bases["sd1"])
    with torch.no_grad():
        before = predict(base)
    adapter = ConceptNeurons()
    adapter.attach(base)
    torch.testing.assert_close(predict(base).detach(), before, rtol=0, atol=0)
    with torch.no_grad():
        adapter.refresh(base.dtype)
        torch.testing.assert_close(predict(base), before, rtol=0, atol=0)
    changed, _ = scored(tiny_bases["sd1"], 0)
    with torch.no_grad():
        assert (predict(changed) - before).abs().max() > 1e-4
        with changed.only([]):
            torch.testing.assert_close(predict(changed), before, rtol=0, atol=0)


def test_masks_come_back_and_unite(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    bases, weights = zip(*(scored(tiny_bases["sd1"], seed) for seed in (0, 1)), strict=True)
    files = [
        export(w, tmp_path / str(i), b, "run", ["neurons", "delta", "pipeline"])
        for i, (b, w) in enumerate(zip(bases, weights, strict=True))
    ]
    report = verify(files[0], bases[0], weights[0])
    assert report.picture_difference is not None and {f.kind for f in report.files} == {"neurons", "delta", "pipeline"}
    sparse, dense = (next(f.path for f in files[0] if f.kind == kind) for kind in ("neurons", "delta"))
    assert sparse.stat().st_size < 0.5 * dense.stat().st_size
    assert exported_of([sparse])[0].kind == "neurons" and inspect_file(sparse)["format"] == "concept neurons"

    paths = [next(f.path for f in group if f.kind == "neurons") for group in files]
    one, other = (read_adapter(order, bases[0]) for order in (paths, paths[::-1]))
    shared = set(weights[0].neurons[LAYER].tolist()) & set(weights[1].neurons[LAYER].tolist())
    assert shared, "the test needs a neuron of both"
    for layer, indices in one.neurons.items():
        assert torch.equal(indices, other.neurons[layer]) and torch.equal(one.dense[layer], other.dense[layer])
        own = [w.neurons.get(layer, torch.empty(0, dtype=torch.int32)) for w in weights]
        assert set(indices.tolist()) == set(torch.cat(own).tolist())
        assert torch.equal(one.dense[layer], shut_change(module_of(bases[0], layer)._parameters["weight"], indices))

    drawn = []
    for how in ("apart", "united"):
        fresh = load_base(tiny_bases["sd1"])
        if how == "united":
            LoadedAdapter(one).attach(fresh)
        else:
            for path in paths:
                load_adapter(path, fresh)
        assert torch.equal((module_of(fresh).weight == 0).flatten().nonzero().flatten().int(), one.neurons[LAYER])
        with torch.no_grad():
            drawn.append(predict(fresh))
    assert torch.equal(*drawn)
    half = load_base(tiny_bases["sd1"])
    load_adapter(paths[0], half, scale=0.5)
    index = weights[0].neurons[LAYER].long()
    own = module_of(half)._parameters["weight"].flatten()[index]
    torch.testing.assert_close(module_of(half).weight.flatten()[index], 0.5 * own)


def test_damaged_indices_are_refused(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    base, weights = scored(tiny_bases["sd1"], 0)
    (file,) = export(weights, tmp_path, base, "run", ["neurons"])
    tensors = load_file(file.path)
    name = next(iter(tensors))
    for wrong in (tensors[name].flip(0), tensors[name] + 10**6, tensors[name] - 10**6):
        save_file({**tensors, name: wrong}, file.path)
        with pytest.raises(DataError, match="ascending indices"):
            read_adapter(file.path, base)
    save_file({**tensors, name: tensors[name].long()}, file.path)
    with pytest.raises(DataError, match="int64"):
        read_adapter(file.path, base)
