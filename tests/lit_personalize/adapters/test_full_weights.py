"""Full fine-tuning equals training a base's own weights, and leaves in every form that can hold it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from lit_personalize.adapters.full_weights import FullWeights
from lit_personalize.adapters.loaded import LoadedAdapter
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.export.exporter import export
from lit_personalize.export.loading import read_adapter
from lit_personalize.export.verify import verify


def predict(base: Base) -> torch.Tensor:
    z = torch.randn(1, base.latent_channels, 16, 16, generator=torch.Generator().manual_seed(3))
    return base.predict_active(z, torch.tensor([400]), base.condition(["a photo of a cat"]))


def train(path: Path, text_encoder: bool = False, dtype: str = "float32") -> tuple[Base, FullWeights]:
    """A base whose every weight has moved."""
    base = load_base(path, dtype=dtype)
    adapter = FullWeights(text_encoder=text_encoder)
    adapter.attach(base)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for factor in adapter.named_factors().values():
            factor.add_(0.05 * torch.randn(factor.shape, generator=draws))
    adapter.refresh(base.dtype)
    return base, adapter


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_gradients_are_those_of_the_weights_themselves(tiny_bases: dict[str, Path], family: str) -> None:
    base, adapter = train(tiny_bases[family], text_encoder=True)
    changed = predict(base)
    changed.square().sum().backward()

    direct = load_base(tiny_bases[family])
    own = {f"{c}.{n}": p for c, m in direct.components().items() if c != "vae" for n, p in m.named_parameters()}
    assert set(own) == set(adapter.named_factors()), "every parameter trains"
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.requires_grad_().add_(adapter.factor(name))
    expected = predict(direct)
    expected.square().sum().backward()
    torch.testing.assert_close(changed, expected, rtol=1e-5, atol=1e-6)
    reached = 0
    # Softmax does not see a bias of keys: its gradient is rounding alone.
    rounding = 1e-8 * max(float(p.grad.abs().max()) for p in own.values() if p.grad is not None)
    for name, parameter in own.items():
        found = adapter.factor(name).grad
        assert (found is None) == (parameter.grad is None), name
        if found is not None and parameter.grad is not None:
            reached += 1
            atol = max(rounding, 1e-3 * float(parameter.grad.abs().max()))
            torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=atol)
    assert reached > 0.9 * len(own)
    with torch.no_grad(), base.only([]):
        torch.testing.assert_close(predict(base), predict(load_base(tiny_bases[family])), rtol=0, atol=0)


def test_a_base_in_bf16_keeps_changes_that_it_could_not_hold(tiny_bases: dict[str, Path]) -> None:
    """A hundred steps of 1e-6 move a weight of 1 by 1e-4; in bf16 not one of them would."""
    base = load_base(tiny_bases["sd1"], dtype="bfloat16")
    adapter = FullWeights()
    adapter.attach(base)
    name = "unet.down_blocks.0.resnets.0.norm1.weight"
    with torch.no_grad():
        for _ in range(100):
            adapter.factor(name).add_(1e-6)
    assert adapter.export_weights().parameters[name].mean() == pytest.approx(1e-4, rel=1e-3)
    with torch.no_grad():
        seen: list[torch.dtype] = []
        for module in (m for m in base.unet.modules() if m._parameters):
            module.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
        predict(base)
    assert set(seen) == {torch.bfloat16}, "no activation is cast"


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_exports_come_back_through_their_clients(tiny_bases: dict[str, Path], tmp_path: Path, family: str) -> None:
    base, adapter = train(tiny_bases[family], text_encoder=True)
    weights = adapter.export_weights()
    files = export(weights, tmp_path, base, "run", ["diffusers", "kohya", "delta", "pipeline"], max_error=0.0)
    report = verify(files, base, weights)
    assert report.picture_difference is not None and report.picture_difference <= 1 / 255 + 1e-6
    assert {f.kind for f in report.files} == {"diffusers", "kohya", "delta", "pipeline"}
    loaded = load_base(tiny_bases[family])
    LoadedAdapter(read_adapter(next(f.path for f in files if f.kind == "delta"), loaded)).attach(loaded)
    with torch.no_grad():
        torch.testing.assert_close(predict(loaded), predict(base), rtol=0, atol=0)


def test_a_lora_says_what_it_leaves_out_and_what_its_rank_costs(
    tiny_bases: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, adapter = train(tiny_bases["sd1"])
    weights = adapter.export_weights()
    with caplog.at_level(logging.WARNING):
        (file,) = export(weights, tmp_path, base, "run", ["diffusers"], max_rank=4)
    left = sum(t.numel() for t in weights.parameters.values())
    whole = sum(p.numel() for p in adapter.factors.values())
    assert f"{left / whole:.2%} of the weights" in file.left_out and file.left_out in caplog.text
    (report,) = verify([file], base, weights).files
    assert report.left_out == file.left_out and set(report.ranks) <= {"1", "2", "3", "4"}
    caplog.clear()
    read_adapter(file.path, base)
    assert file.left_out in caplog.text and "relative error of up to 0." in caplog.text, "whoever samples is told, too"
    layer = "unet.conv_out"
    singular = torch.linalg.svdvals(weights.dense[layer].double())
    optimum = float(singular[4:].square().sum().sqrt() / singular.square().sum().sqrt())
    assert file.errors[layer] == pytest.approx(optimum, abs=1e-6)
