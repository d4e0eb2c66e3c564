"""Magnitude fitting: rows get longer or shorter, angles between them stay, and the rotation is not trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lit_personalize.adapters.oft import OFT
from lit_personalize.adapters.oft_magnitudes import OFTMagnitudes
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.errors import UsageError
from lit_personalize.export.exporter import export
from lit_personalize.export.loading import read_adapter
from lit_personalize.export.verify import verify
from lit_personalize.fitting import fit
from lit_personalize.preflight import refuse_formats

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture
def rotated(tiny_bases: dict[str, Path], tmp_path: Path) -> tuple[AdapterWeights, Path]:
    """Rotations, and the folder of their export."""
    base = load_base(tiny_bases["sd1"])
    adapter = OFT()
    adapter.attach(base)
    with torch.no_grad():
        for factor in adapter.factors.values():
            factor.add_(0.2 * torch.randn(factor.shape))
    weights = adapter.export_weights()
    export(weights, tmp_path / "first" / "exports", base, "first", ["peft"])
    return weights, tmp_path / "first"


def shown(base: Base) -> torch.Tensor:
    return base.unet.get_submodule(LAYER.removeprefix("unet.")).weight.detach()


def test_rows_scale_and_angles_stay(
    tiny_bases: dict[str, Path], tmp_path: Path, rotated: tuple[AdapterWeights, Path]
) -> None:
    weights, run = rotated
    base = load_base(tiny_bases["sd1"])
    frozen = shown(base).clone()
    adapter = OFTMagnitudes(str(run))
    adapter.attach(base)
    assert adapter.layers() == list(weights.rotations) and adapter.factor(LAYER).shape == (len(frozen),)
    for layer in adapter.layers():
        assert torch.equal(adapter.delta(layer), weights.dense[layer]), "m starts at 1: the rotation and no more"
    shown_before = shown(base).clone()
    base.unet.get_submodule(LAYER.removeprefix("unet.")).weight.square().sum().backward()
    gradient = adapter.factor(LAYER).grad
    assert gradient is not None  # of m²‖w‖² at m = 1
    torch.testing.assert_close(gradient, 2 * shown_before.square().sum(1))

    magnitudes = {layer: torch.rand(len(adapter.factor(layer))) + 0.5 for layer in adapter.layers()}
    adapter.restore(magnitudes)
    adapter.refresh(base.dtype)
    after, m = shown(base), magnitudes[LAYER]
    torch.testing.assert_close(after.norm(dim=1), m * frozen.norm(dim=1))
    rows, before = F.normalize(after, dim=1), F.normalize(frozen, dim=1)
    torch.testing.assert_close(rows @ rows.T, before @ before.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(after, m[:, None] * shown_before)
    with base.only([]):
        assert torch.equal(shown(base), frozen)

    exported = adapter.export_weights()
    torch.testing.assert_close(frozen + exported.dense[LAYER], after)
    files = export(exported, tmp_path / "second", base, "second", ["delta", "pipeline"])
    assert verify(files, base, exported).picture_difference is not None
    read = read_adapter(files[0].path, base)
    assert all(torch.equal(read.dense[layer], exported.dense[layer]) for layer in exported.dense)


def test_formats_and_files_without_a_place_for_it_are_refused(
    tiny_bases: dict[str, Path], tmp_path: Path, rotated: tuple[AdapterWeights, Path]
) -> None:
    weights, run = rotated
    base = load_base(tiny_bases["sd1"])
    adapter = OFTMagnitudes(str(run / "exports" / "peft_oft" / "unet"))
    adapter.attach(base)
    refuse_formats([adapter], ["pipeline", "delta", "diffusers"])
    with pytest.raises(UsageError, match="peft is not for OFTMagnitudes: PEFT's OFT holds rotations without lengths"):
        refuse_formats([adapter], ["pipeline", "peft"])
    refuse_formats([OFT()], ["peft"])
    options = {
        "name": "x", "root": str(tmp_path), "data.init_args.concepts": "[{path: nowhere, prompt: a cat}]",
        "model.init_args.adapters": "[{class_path: OFTMagnitudes, init_args: {rotations: nowhere}}]",
    }  # fmt: skip
    with pytest.raises(UsageError, match="peft is not for OFTMagnitudes"):  # before anything is loaded
        fit(["-c", "oft/tinyworld", *(f"--{key}={value}" for key, value in options.items())])
    (delta,) = export(weights, tmp_path / "delta", base, "delta", ["delta"])
    with pytest.raises(UsageError, match="holds no rotations of OFT"):
        OFTMagnitudes(str(delta.path)).attach(load_base(tiny_bases["sd1"]))
