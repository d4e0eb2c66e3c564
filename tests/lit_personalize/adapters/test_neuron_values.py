"""Values of neurons: nothing else changes, and what is trained comes back in every format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_personalize.adapters.neuron_values import NeuronValues
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.adapters.shadow import all_parameters
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.cli.main import main
from lit_personalize.errors import DataError, UsageError
from lit_personalize.export.exporter import export
from lit_personalize.export.inspect import inspect_file
from lit_personalize.export.loading import load_adapter, read_adapter
from lit_personalize.export.verify import verify
from lit_personalize.merging.neurons import unite

LAYERS = [f"unet.mid_block.attentions.0.transformer_blocks.0.attn2.{name}" for name in ("to_k", "to_v")]


@pytest.fixture
def base(tiny_bases: dict[str, Path]) -> Base:
    return load_base(tiny_bases["sd1"])


def weight_of(base: Base, layer: str) -> torch.Tensor:
    """What the layer shows: the effective weight."""
    return base.unet.get_submodule(layer.removeprefix("unet.")).weight.detach().flatten()


def frozen_of(base: Base, layer: str) -> torch.Tensor:
    return base.unet.get_submodule(layer.removeprefix("unet."))._parameters["weight"].detach().flatten()


def masked(base: Base, folder: Path, *indices: list[int]) -> Path:
    """A file that shuts off these neurons of the first layers, as ConceptNeurons exports them."""
    weights = AdapterWeights()
    for layer, own in zip(LAYERS, indices, strict=False):
        weights.neurons[layer] = torch.tensor(own, dtype=torch.int32)
        dense = torch.zeros_like(frozen_of(base, layer))
        dense[own] = -frozen_of(base, layer)[own]
        weights.dense[layer] = dense.reshape(base.unet.get_submodule(layer.removeprefix("unet.")).weight.shape)
    (file,) = export(weights, folder, base, folder.name, ["neurons"])
    return file.path


def test_only_the_neurons_change_and_come_back_in_every_format(base: Base, tmp_path: Path) -> None:
    indices = [[0, 5, 7, 100], [3, 64]]
    file = masked(base, tmp_path / "mask", *indices)
    adapter = NeuronValues(str(file))
    adapter.attach(base)
    assert [adapter.factor(layer).shape for layer in LAYERS] == [(4,), (2,)] and adapter.layers() == LAYERS
    assert not weight_of(base, LAYERS[0])[indices[0]].any(), "training starts where the mask is"
    before = {name: getattr(m, p).detach().clone() for name, (m, p) in all_parameters(base.unet).items()}
    optimizer = torch.optim.AdamW(adapter.factors.values(), lr=0.1)
    for _ in range(2):
        adapter.refresh(base.dtype)
        z = torch.randn(1, base.latent_channels, 16, 16)
        base.predict_active(z, torch.tensor([400]), base.condition(["a photo of a cat"])).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter.refresh(base.dtype)
    names = [f"{layer.removeprefix('unet.')}.weight" for layer in LAYERS]
    for name, (module, parameter) in all_parameters(base.unet).items():
        now = getattr(module, parameter).detach()
        expected = before[name].flatten().clone()
        if name in names:
            layer = f"unet.{name.removesuffix('.weight')}"
            values = adapter.factor(layer).detach()
            assert (values.abs() > 0.05).all(), "every neuron was trained"
            expected[indices[LAYERS.index(layer)]] = values
        assert torch.equal(now.flatten(), expected), name
    with base.only([]):
        assert torch.equal(weight_of(base, LAYERS[0]), frozen_of(base, LAYERS[0]))

    weights = adapter.export_weights()
    for layer in LAYERS:
        torch.testing.assert_close(adapter.delta(layer).detach(), weights.dense[layer], rtol=0, atol=0)
    with base.only([]):
        files = export(weights, tmp_path / "run", base, "run", ["neurons", "delta", "pipeline"])
        report = verify(files, base, weights)
    assert [f.kind for f in report.files] == ["delta", "neurons", "pipeline"] and report.files[1].layers == 2
    sparse = next(f.path for f in files if f.kind == "neurons")
    assert inspect_file(sparse)["layers"] == 2 and inspect_file(sparse)["components"] == {"unet": 2}
    for strength in (1.0, 0.5):
        for path in (sparse, next(f.path for f in files if f.kind == "delta")):
            fresh = load_base(base.source)
            load_adapter(path, fresh, scale=strength)
            for layer in LAYERS:
                wanted = torch.lerp(frozen_of(base, layer), weight_of(base, layer), strength)
                exact = path == sparse and strength == 1
                torch.testing.assert_close(weight_of(fresh, layer), wanted, rtol=0, atol=0 if exact else 1e-6)
    again = NeuronValues(str(sparse))
    again.attach(load_base(base.source))
    assert all(torch.equal(again.factor(layer), adapter.factor(layer)) for layer in LAYERS), "values go on from there"


def test_masks_unite_into_a_file_that_counts(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [masked(base, tmp_path / "cat", [0, 5, 7], [1]), masked(base, tmp_path / "barn", [5, 6, 7])]
    command = ["merge", "neurons", *(str(file.parent) for file in files), "--base", base.source, "--json"]
    assert main([*command, "-o", str(tmp_path / "both")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [adapter["neurons"] for adapter in report["adapters"]] == [4, 3]
    assert report["extra"] == {"neurons": 5, "shared by two or more": 2} and report["verified"]
    read = read_adapter(tmp_path / "both", base)
    assert {layer: own.tolist() for layer, own in read.neurons.items()} == {LAYERS[0]: [0, 5, 6, 7], LAYERS[1]: [1]}
    load_adapter(tmp_path / "both", base)
    zero = weight_of(base, LAYERS[0]) == 0
    assert zero.nonzero().flatten().tolist() == [0, 5, 6, 7]
    assert torch.equal(weight_of(base, LAYERS[0])[~zero], frozen_of(base, LAYERS[0])[~zero])


def test_what_has_no_neurons_is_refused(base: Base, tmp_path: Path) -> None:
    file = masked(base, tmp_path / "mask", [1, 2])
    trained = read_adapter(file, base)
    trained.values = {LAYERS[0]: torch.tensor([0.5, 1.0])}
    with pytest.raises(UsageError, match="fit its own union alone"):
        unite([trained, read_adapter(file, base)], ["trained", "mask"])
    with pytest.raises(UsageError, match="one is its own union"):
        unite([trained], ["trained"])
    with pytest.raises(UsageError, match="two adapters change"):
        trained.merge(read_adapter(file, base))
    with pytest.raises(DataError, match="holds 0 files"):
        NeuronValues(str(tmp_path)).attach(base)
    (delta,) = export(trained, tmp_path / "delta", base, "delta", ["delta"])
    with pytest.raises(UsageError, match="no concept neurons"):
        NeuronValues(str(delta.path)).attach(base)
    (own,) = export(trained, tmp_path / "values", base, "values", ["neurons"])
    tensors = load_file(own.path)
    name = next(key for key in tensors if key.endswith(".val"))
    for wrong in (tensors[name][:1].clone(), tensors[name].repeat(2)):
        save_file({**tensors, name: wrong}, own.path)
        with pytest.raises(DataError, match="one value for each index"):
            read_adapter(own.path, base)
    save_file({name: tensors[name]}, own.path)
    with pytest.raises(DataError, match="one value for each index"):
        read_adapter(own.path, base)
