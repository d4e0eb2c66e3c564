"""K-LoRA: which LoRA a layer takes at which step, and that a picture is drawn with the chosen ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_personalize.adapters.key_value_delta import KeyValueDelta
from lit_personalize.adapters.klora import KLoRA
from lit_personalize.adapters.loaded import LoadedAdapter
from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.protocol import AdapterWeights, LowRank
from lit_personalize.backbones.loading import load_base
from lit_personalize.cli.main import main
from lit_personalize.errors import UsageError
from lit_personalize.export.exporter import export
from lit_personalize.sampling.sampler import SamplingOptions, generate_latents


def low_rank(values: list[list[float]]) -> LowRank:
    """ΔW [2, 2] of rank 1 given as up x down."""
    up, down = (torch.tensor(v) for v in values)
    return LowRank(down[None], up[:, None], 1.0)


def test_the_choice_by_hand() -> None:
    """K = 1: the largest |ΔW| counts. γ = (4 + 4) / (2 + 6) = 1."""
    content = {"unet.a": low_rank([[1.0, 1.0], [1.0, 1.0]]), "unet.b": low_rank([[1.0, 1.0], [1.0, 1.0]])}
    style = {"unet.a": low_rank([[0.5, 0.5], [1.0, 1.0]]), "unet.b": low_rank([[-1.5, 1.5], [1.0, 1.0]]),
             "unet.c": low_rank([[1.0, 0.0], [1.0, 0.0]])}  # fmt: skip
    adapter = KLoRA(AdapterWeights(low_rank=content), AdapterWeights(low_rank=style))
    assert adapter.balance == pytest.approx(1.0) and set(adapter.scores) == {"unet.a", "unet.b"}
    # a: 1 < (1.5 p + 0.5) 0.5 from p = 1 on, b: 1 < (1.5 p + 0.5) 1.5 from p = 1/9 on
    assert [adapter.takes_style("unet.a", p) for p in (0.0, 0.9, 1.01)] == [False, False, True]
    assert [adapter.takes_style("unet.b", p) for p in (0.0, 0.1, 0.12, 1.0)] == [False, False, True, True]
    assert adapter.weights.low_rank["unet.c"] is style["unet.c"], "only the style changes it"


def trained(path: Path, seed: int, scale: float) -> AdapterWeights:
    base, adapter = load_base(path), LoRA(rank=2)
    adapter.attach(base, seed)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in adapter.factors.values():
            factor.add_(scale * torch.randn(factor.shape, generator=draws))
    return adapter.export_weights()


def test_pictures_are_drawn_with_the_chosen_loras(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """Always content and always style are those LoRAs alone; between them, each layer switches once, to the style."""
    path = tiny_bases["sd1"]
    content, style = trained(path, 1, 0.2), trained(path, 2, 0.2)
    options = SamplingOptions(steps=4, guidance=1)

    def drawn(*adapters: LoadedAdapter) -> torch.Tensor:
        base = load_base(path)
        for adapter in adapters:
            adapter.attach(base)
        return generate_latents(base, ["a cat"], [3], adapters, options)

    for slope, offset, alone in ((0.0, 0.0, content), (0.0, 1e9, style)):
        got = drawn(KLoRA(content, style, slope=slope, offset=offset))
        torch.testing.assert_close(got, drawn(LoadedAdapter(alone)), atol=1e-5, rtol=1e-5)
    adapter = KLoRA(content, style)
    mixed = drawn(adapter)
    shares = [sum(adapter.takes_style(layer, p) for layer in adapter.scores) for p in (0.0, 0.3, 0.6, 1.0)]
    assert shares == sorted(shares) and shares[0] < shares[-1]
    assert all((mixed - drawn(LoadedAdapter(alone))).abs().max() > 1e-3 for alone in (content, style))
    assert torch.equal(mixed, drawn(adapter_again := KLoRA(content, style))) and adapter_again.active


def test_the_command(tiny_bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_bases["sd1"]
    base = load_base(path)
    for seed, name in enumerate(("content", "style")):
        export(trained(path, seed, 0.2), tmp_path / name, base, name, ["diffusers"])
    command = ["sample", "a cat", "--base", str(path), "--steps", "2", "-o", str(tmp_path / "out"), "--k-lora"]
    assert main([*command, str(tmp_path / "content"), str(tmp_path / "style")]) == 0
    assert (tmp_path / "out/grid.png").exists()
    assert main([*command, str(tmp_path / "content"), str(tmp_path / "none")]) == 3
    assert "does not exist" in capsys.readouterr().err


def test_what_cannot_be_chosen_from(tiny_bases: dict[str, Path]) -> None:
    base, adapter = load_base(tiny_bases["sd1"]), KeyValueDelta()
    adapter.attach(base)
    factors = {"unet.a": low_rank([[1.0, 1.0], [1.0, 1.0]])}
    content = AdapterWeights(low_rank=factors, tokens={"<a>": [torch.ones(1, 4)]})
    with pytest.raises(UsageError, match="the style adapter is no LoRA"):
        KLoRA(content, adapter.export_weights())
    with pytest.raises(UsageError, match="both adapters call their token <a>"):
        KLoRA(content, content)
