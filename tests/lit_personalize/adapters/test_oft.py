"""Rotations stay rotations: orthogonal, angle-preserving, within COFT's ball, and the same in PEFT's hands."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from lit_personalize.adapters.loaded import LoadedAdapter
from lit_personalize.adapters.oft import OFT, ball_radius, cayley_change, project, skew
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.errors import DataError, UsageError, VerificationError
from lit_personalize.export.exporter import export
from lit_personalize.export.inspect import inspect_file
from lit_personalize.export.loading import read_adapter
from lit_personalize.export.verify import adapters_in, exported_of, verify

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def trained(path: Path, size: float = 0.2, eps: float | None = None, dtype: str = "float32") -> tuple[Base, OFT]:
    base = load_base(path, dtype=dtype)
    adapter = OFT(eps=eps)
    adapter.attach(base)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for factor in adapter.named_factors().values():
            factor.add_(size * torch.randn(factor.shape, generator=draws))
    adapter.refresh(base.dtype)
    return base, adapter


def energy(weight: torch.Tensor) -> torch.Tensor:
    """Hyperspherical energy of a layer's neurons, the rows: Σ 1 / ‖ŵ_i - ŵ_j‖."""
    return F.pdist(F.normalize(weight, dim=1)).reciprocal().sum()


def test_the_transform_is_orthogonal_and_the_published_one() -> None:
    upper = torch.randn(3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    eye = torch.eye(5, dtype=torch.float64)
    rotation = cayley_change(upper) + eye
    torch.testing.assert_close(rotation.mT @ rotation, eye.expand(3, 5, 5), atol=1e-12, rtol=0)
    s = skew(upper)
    assert s[0, 0, 1] == upper[0, 0] and torch.equal(s, -s.mT)
    torch.testing.assert_close(rotation, (eye - s) @ torch.linalg.inv(eye + s))
    assert torch.autograd.gradcheck(cayley_change, upper[:1].requires_grad_())


def test_starts_as_the_base_and_keeps_every_angle(tiny_bases: dict[str, Path]) -> None:
    base, adapter = trained(tiny_bases["sd1"], size=0.0)
    assert all(not adapter.delta(layer).any() for layer in adapter.layers())
    base, adapter = trained(tiny_bases["sd1"])
    layer = base.unet.get_submodule(LAYER.removeprefix("unet."))
    before = layer._parameters["weight"].detach()
    with torch.no_grad():
        after = before + adapter.delta(LAYER)
        torch.testing.assert_close(layer.weight, after)
    assert (after - before).norm() / before.norm() > 0.1
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1))
    torch.testing.assert_close(after @ after.T, before @ before.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(energy(after), energy(before), rtol=1e-4, atol=0)
    b = layer.in_features // 4
    assert adapter.factor(LAYER).numel() == 4 * b * (b - 1) // 2
    layer.weight.square().cumsum(0).sum().backward()
    assert adapter.factor(LAYER).grad is not None and adapter.factor(LAYER).grad.abs().max() > 0


def test_counts_of_the_real_base() -> None:
    """q, k, v and out of SD1's attention in four blocks of b = in / 4: b(b-1)/2 weights a block."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        base = SimpleNamespace(unet=unet, register=lambda adapter: None, dtype=torch.float32)
        adapter = OFT()
        adapter.attach(base)  # type: ignore[arg-type]
    assert len(adapter.layers()) == 128
    assert sum(factor.numel() for factor in adapter.factors.values()) == 11_602_368


def test_the_ball_is_the_authors_and_not_peft_s() -> None:
    assert ball_radius(6e-5, 80, 4) == pytest.approx(0.192)
    assert ball_radius(6e-5, 80, 4) / (6e-5 / math.sqrt(4)) == pytest.approx(6400), "PEFT's is b² times tighter"
    small, large = torch.full((2, 10), 1e-3), torch.full((2, 10), 1.0)
    assert torch.equal(project(small, 0.192), small), "nothing happens inside"
    clipped = project(large, 0.192)
    torch.testing.assert_close(torch.linalg.matrix_norm(skew(clipped)), torch.full((2,), 0.192))
    assert torch.equal(project(clipped, 0.192), clipped), "or a resumed run would differ from an undisturbed one"


def test_coft_holds_the_trained_factor_in_its_ball(tiny_bases: dict[str, Path]) -> None:
    base, adapter = trained(tiny_bases["sd1"], eps=1e-3)
    for layer in adapter.layers():
        upper = adapter.factor(layer).detach()
        b = base.unet.get_submodule(layer.removeprefix("unet.")).in_features // 4
        assert torch.linalg.matrix_norm(skew(upper)).max() <= ball_radius(1e-3, b, 4) * (1 + 1e-5)
    before = adapter.snapshot()
    with base.only([]), base.only([adapter]):  # sampling switches adapters, which must not move them
        pass
    assert all(torch.equal(value, before[name]) for name, value in adapter.snapshot().items())


def test_no_activation_is_cast(tiny_bases: dict[str, Path]) -> None:
    base, adapter = trained(tiny_bases["sd1"], dtype="bfloat16")
    layer = base.unet.get_submodule(LAYER.removeprefix("unet."))
    assert layer.weight.dtype == torch.bfloat16 and adapter.factor(LAYER).dtype == torch.float32


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_peft_turns_the_same_way(tiny_bases: dict[str, Path], tmp_path: Path, family: str) -> None:
    base, adapter = trained(tiny_bases[family])
    weights = adapter.export_weights()
    files = export(weights, tmp_path, base, "run", ["peft", "pipeline"])
    assert [f.kind for f in files] == ["oft", "pipeline"]
    report = verify(files, base, weights)
    assert report.files[0].layers == len(adapter.layers()) and report.files[0].largest_error <= 1e-6
    assert verify(exported_of(adapters_in(tmp_path)), base).files
    assert inspect_file(files[0].path)["format"] == "PEFT OFT"
    read = read_adapter(tmp_path, base)
    for layer, delta in weights.dense.items():
        torch.testing.assert_close(read.dense[layer], delta, atol=1e-7, rtol=1e-5)
        assert torch.equal(read.rotations[layer], weights.rotations[layer])
    fresh = load_base(tiny_bases[family])
    LoadedAdapter(read).attach(fresh)
    z = torch.randn(1, base.latent_channels, 16, 16)
    with torch.no_grad():
        asked = [x.predict_active(z, torch.tensor([400]), x.condition(["a cat"])) for x in (base, fresh)]
    torch.testing.assert_close(*asked, atol=1e-5, rtol=1e-4)


def test_a_folder_that_turns_backwards_is_read_as_its_client_would(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """`use_cayley_neumann` inverts the rotation: our own numbers under PEFT's default do not verify as ours."""
    base, adapter = trained(tiny_bases["sd1"], size=0.02)
    weights = adapter.export_weights()
    (file,) = export(weights, tmp_path, base, "run", ["peft"])
    config = file.path / "adapter_config.json"
    said = json.loads(config.read_text())
    assert said["use_cayley_neumann"] is False and said["coft"] is False and said["r"] == 4
    config.write_text(json.dumps({**said, "use_cayley_neumann": True}))
    with pytest.raises(VerificationError, match="comes back with relative error"):
        verify([file], base, weights)
    assert verify([file], base).files[0].largest_error <= 1e-6, "our reader and PEFT agree on the series"
    forward, backward = weights.dense[LAYER], read_adapter(file.path, base).dense[LAYER]
    assert F.cosine_similarity(forward.flatten(), backward.flatten(), dim=0) < -0.9
    config.write_text(json.dumps({**said, "coft": True, "eps": 1e-3}))
    assert verify([file], base).files[0].largest_error <= 1e-6, "and on the ball"


def test_a_lora_of_a_rotation_declares_its_error(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    base, adapter = trained(tiny_bases["sd1"])
    weights = adapter.export_weights()
    (file,) = export(weights, tmp_path, base, "run", ["diffusers"], max_rank=8)
    assert max(file.errors.values()) > 0.1, "a rotation has full rank"
    assert verify([file], base, weights).files[0].allowed_error < 1.02 * max(file.errors.values()) + 1e-5


def test_wrong_options_and_files_are_refused(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    base = load_base(tiny_bases["sd1"])
    with pytest.raises(UsageError, match="do not divide"):
        OFT(blocks=5).attach(base)
    with pytest.raises(UsageError, match="match no linear layer"):
        OFT(targets=["conv1"]).attach(base)
    with pytest.raises(UsageError, match="unknown OFT targets"):
        OFT(targets="blocks")
    base, adapter = trained(tiny_bases["sd1"])
    (file,) = export(adapter.export_weights(), tmp_path, base, "run", ["peft"])
    path = file.path / "adapter_model.safetensors"
    save_file({name: t[:2].clone() for name, t in load_file(path).items()}, path)
    with pytest.raises(DataError, match="2 blocks of"):
        read_adapter(file.path, base)
