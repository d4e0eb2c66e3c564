"""ZipLoRA: columns scaled in low-rank form, the mergers' loss and gradients, a LoRA of rank r_c + r_s as the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_personalize.adapters.key_value_delta import KeyValueDelta
from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.protocol import Adapter
from lit_personalize.adapters.token_embedding import TokenEmbedding
from lit_personalize.adapters.ziplora import ZipLoRA
from lit_personalize.backbones.base import Base
from lit_personalize.backbones.loading import load_base
from lit_personalize.batch import Batch
from lit_personalize.errors import UsageError
from lit_personalize.export.exporter import export
from lit_personalize.export.loading import load_adapter
from lit_personalize.objectives.merged_distillation import MergedDistillation

CAPTIONS = ["photo of a <new1> cat", "style of <b> toy"]


def write(path: Path, folder: Path, adapters: list[Adapter], seed: int) -> Path:
    base = load_base(path)
    draws = torch.Generator().manual_seed(seed)
    weights = None
    for adapter in adapters:
        adapter.attach(base)
        with torch.no_grad():
            for factor in adapter.named_factors().values():
                factor.add_(0.2 * torch.randn(factor.shape, generator=draws))
        own = adapter.export_weights()
        weights = own if weights is None else weights.merge(own)
    export(weights, folder, base, folder.name, ["diffusers"])
    return folder


@pytest.fixture(scope="module")
def files(tiny_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """On the SDXL base: a content LoRA of rank 3 and alpha 6 with a token, a style LoRA of rank 2 with convolutions."""
    root = tmp_path_factory.mktemp("zip")
    base = tiny_bases["sdxl"]
    content = [LoRA(rank=3, alpha=6.0), TokenEmbedding("<new1>", "cat")]
    style = [LoRA(rank=2, targets=["attn2.to_k", "attn2.to_v", "conv1"]), TokenEmbedding("<b>", "toy")]
    return {"base": base, "content": write(base, root / "content", content, 1),
            "style": write(base, root / "style", style, 2)}  # fmt: skip


def zipped(files: dict[str, Path], **options: object) -> MergedDistillation:
    adapter = ZipLoRA(str(files["content"]), str(files["style"]))
    objective = MergedDistillation(str(files["base"]), [adapter], **options)  # type: ignore[arg-type]
    objective.configure_model()
    return objective


def batch_of(objective: MergedDistillation, make_batch: Callable[..., Batch], concepts: list[int]) -> Batch:
    batch = make_batch(objective.built, [CAPTIONS[c] for c in concepts])
    batch.concept = torch.tensor(concepts)
    return batch


def drawn(base: Base, adapters: list[Adapter], caption: str) -> torch.Tensor:
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return base.predict(z, torch.tensor([400]), base.condition([caption]), adapters)


def test_it_starts_as_the_sum_and_shows_each_lora_as_it_was(files: dict[str, Path]) -> None:
    objective = zipped(files)
    adapter = objective.trained[0]
    assert isinstance(adapter, ZipLoRA)
    parts = {}
    for part in ("content", "style"):
        base = load_base(files["base"])
        parts[part] = load_adapter(files[part], base)
        adapter.show(part)  # type: ignore[arg-type]
        caption = CAPTIONS[part == "style"]
        got = drawn(objective.built, [adapter], caption)
        torch.testing.assert_close(got, drawn(base, [parts[part]], caption), atol=2e-5, rtol=2e-5)
    adapter.show(None)
    for layer in adapter.layers():
        dense = sum(own.delta(layer) for own in parts.values() if layer in own.layers())
        torch.testing.assert_close(adapter.delta(layer), dense, atol=1e-6, rtol=1e-5)
    assert set(adapter.layers()) == {layer for own in parts.values() for layer in own.layers()}


def test_columns_are_scaled_and_the_export_is_what_was_trained(files: dict[str, Path], tmp_path: Path) -> None:
    objective = zipped(files)
    adapter = objective.trained[0]
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for factor in adapter.named_factors().values():
            factor.copy_(torch.rand(factor.shape, generator=draws))
    adapter.refresh(torch.float32)
    parts = {part: load_adapter(files[part], load_base(files["base"])) for part in ("content", "style")}
    for layer in adapter.layers():
        dense = torch.zeros(())
        for part, own in parts.items():
            if layer in own.layers():
                dense = dense + own.delta(layer) * adapter.factor(f"{layer}:{part}").detach().flatten()
        torch.testing.assert_close(adapter.delta(layer).detach(), dense, atol=1e-6, rtol=1e-5)
    weights = adapter.export_weights()
    assert {f.rank for f in weights.low_rank.values()} == {2, 3, 5}
    export(weights, tmp_path / "out", objective.built, "zip", ["diffusers"])
    base = load_base(files["base"])
    loaded = load_adapter(tmp_path / "out", base)
    for caption in CAPTIONS:
        torch.testing.assert_close(
            drawn(base, [loaded], caption), drawn(objective.built, [adapter], caption), atol=2e-5, rtol=2e-5
        )


def test_similarity_by_hand(files: dict[str, Path]) -> None:
    adapter = zipped(files).trained[0]
    assert isinstance(adapter, ZipLoRA)
    shared = [layer for layer in adapter.layers() if layer.endswith(("attn2.to_k", "attn2.to_v"))]
    with torch.no_grad():
        for layer in shared:
            adapter.factor(f"{layer}:content").fill_(0.5)
            adapter.factor(f"{layer}:style")[0] = -3.0
    widths = [adapter.factor(f"{layer}:style").numel() for layer in shared]
    dot = sum(abs(0.5 * (width - 1) - 1.5) for width in widths)
    assert float(adapter.similarity("dot")) == pytest.approx(dot, rel=1e-5)
    each = sum((0.5 * (width - 1) + 1.5) / width for width in widths)
    assert float(adapter.similarity("elementwise")) == pytest.approx(each, rel=1e-5)


def test_the_loss_vanishes_where_one_lora_is_left(files: dict[str, Path], make_batch: Callable[..., Batch]) -> None:
    """m_s = 0 is the content's LoRA alone: no distance to it, but to the style's; both concepts weigh the same."""
    objective = zipped(files, similarity_weight=0.0)
    adapter = objective.trained[0]
    with torch.no_grad():
        for name, factor in adapter.named_factors().items():
            factor.fill_(0.0 if name.endswith(":style") else 1.0)
    adapter.refresh(torch.float32)
    loss = objective.loss(batch_of(objective, make_batch, [0, 0, 1]), 0)
    assert loss.per_sample[:2].abs().max() < 1e-9 < loss.per_sample[2] and loss.weights.tolist() == [0.5, 0.5, 1.0]
    with pytest.raises(UsageError, match="two concepts"):
        objective.loss(make_batch(objective.built, CAPTIONS), 0)


@pytest.mark.parametrize("kind", ["dot", "elementwise"])
def test_gradients_are_finite_differences(files: dict[str, Path], make_batch: Callable[..., Batch], kind: str) -> None:
    objective = zipped(files, similarity=kind, similarity_weight=0.003)
    adapter, batch = objective.trained[0], batch_of(objective, make_batch, [0, 1])
    layer = next(name for name in adapter.layers() if name.endswith("attn2.to_k"))
    with torch.no_grad():
        for i, factor in enumerate(adapter.factors.values()):
            factor.mul_(0.7 if i % 2 else 1.2)

    def value() -> torch.Tensor:
        adapter.refresh(torch.float32)
        return objective.loss(batch, 0).reduce()

    value().backward()
    for part in ("content", "style"):
        factor = adapter.factor(f"{layer}:{part}")
        direction = torch.randn(factor.shape, generator=torch.Generator().manual_seed(4))
        step, found = 1e-2, []
        for sign in (1, -1):
            with torch.no_grad():
                factor.add_(sign * step * direction)
                found.append(float(value()))
                factor.sub_(sign * step * direction)
        slope = (found[0] - found[1]) / (2 * step)
        assert float((factor.grad * direction).sum()) == pytest.approx(slope, rel=2e-2, abs=1e-4)


def test_a_large_weight_pulls_the_mergers_apart(files: dict[str, Path], make_batch: Callable[..., Batch]) -> None:
    objective = zipped(files, similarity_weight=1.0)
    optimizer = torch.optim.Adam(objective.parameter_groups(), lr=0.05)
    batch, found = batch_of(objective, make_batch, [0, 1]), []
    for step in range(8):
        objective._refresh()
        loss = objective.loss(batch, step)
        optimizer.zero_grad()
        loss.reduce().backward()
        optimizer.step()
        found.append(float(loss.terms["similarity"]))
    assert all(later < earlier for earlier, later in zip(found, found[1:], strict=False))
    assert float(loss.terms["moved"]) > 0


def test_what_cannot_be_zipped(files: dict[str, Path], tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    base = load_base(files["base"])
    adapter = KeyValueDelta()
    adapter.attach(base)
    export(adapter.export_weights(), dense, base, "dense", ["delta"])
    for content, style, said in (
        (dense, files["style"], "is no LoRA"), (files["content"], files["content"], "both call their token <new1>"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            ZipLoRA(str(content), str(style)).attach(load_base(files["base"]))
    with pytest.raises(UsageError, match="trains one ZipLoRA"):
        MergedDistillation(str(files["base"]), [LoRA()])
    with pytest.raises(UsageError, match="must not be negative"):
        MergedDistillation("x", [ZipLoRA("a", "b")], similarity_weight=-1.0)
