"""Metrics against their definitions: identities, libraries, and published layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lit_personalize.adapters.lora import LoRA
from lit_personalize.backbones.loading import load_base
from lit_personalize.backbones.tiny import write_tiny_clip
from lit_personalize.errors import DataError, UsageError
from lit_personalize.metrics import alignment
from lit_personalize.metrics.evaluation import TEXT_MEASURES, Figure, evaluate
from lit_personalize.metrics.features import Clip, Dino, clip_directory
from lit_personalize.metrics.kernel_distance import KERNELS, mmd2
from lit_personalize.metrics.suites import customconcept101, dreambooth
from lit_personalize.sampling.sampler import SamplingOptions, generate
from lit_personalize.tinyworld.card import caption_retrieval


def _features(n: int, d: int = 16, seed: int = 0, shift: float = 0.0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_mmd_of_a_set_with_itself_is_zero(kernel: str) -> None:
    x = _features(9)
    assert abs(mmd2(x, x, kernel, biased=True)) < 1e-12
    assert mmd2(x, _features(7, seed=1, shift=1.0), kernel, biased=True) > 0


def test_linear_mmd_is_the_distance_of_the_means() -> None:
    x, y = _features(9), _features(5, seed=1)
    assert abs(mmd2(x, y, "linear", biased=True) - float((x.mean(0) - y.mean(0)).square().sum())) < 1e-12


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_mmd_is_symmetric_and_ignores_order_and_rotation(kernel: str) -> None:
    x, y = _features(9), _features(6, seed=1)
    turn, _ = torch.linalg.qr(_features(16, seed=2))
    value = mmd2(x, y, kernel)
    assert abs(value - mmd2(y, x, kernel)) < 1e-12
    assert abs(value - mmd2(x.flip(0), y, kernel)) < 1e-12
    assert abs(value - mmd2(x @ turn, y @ turn, kernel)) < 1e-9


def test_unbiased_mmd_has_mean_zero_on_one_distribution() -> None:
    values = [mmd2(_features(20, seed=2 * i), _features(30, seed=2 * i + 1), "kid") for i in range(200)]
    mean, spread = float(np.mean(values)), float(np.std(values) / 200**0.5)
    assert abs(mean) < 4 * spread


def test_kid_equals_torchmetrics() -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    class Flat(nn.Module):
        num_features = 12

        def forward(self, pictures: Tensor) -> Tensor:
            return pictures.flatten(1).float() / 50

    draws = torch.Generator().manual_seed(0)
    real = torch.randint(0, 255, (8, 3, 2, 2), generator=draws, dtype=torch.uint8)
    fake = torch.randint(0, 200, (8, 3, 2, 2), generator=draws, dtype=torch.uint8)
    metric = KernelInceptionDistance(feature=Flat(), subsets=1, subset_size=8)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    expected = float(metric.compute()[0])
    assert abs(mmd2(Flat()(real), Flat()(fake), "kid") - expected) < 1e-4 * abs(expected)


def test_mmd_says_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="needs two samples on each side, not 1 and 3"):
        mmd2(_features(1), _features(3))
    with pytest.raises(ValueError, match="unknown kernel 'rbf'"):
        mmd2(_features(3), _features(3), "rbf")


def test_alignment_identities() -> None:
    x = _features(4)
    assert abs(alignment.text_alignment(x, 3 * x) - 1) < 1e-12
    assert abs(alignment.clip_score(x, x) - 2.5) < 1e-12
    assert alignment.clip_score(x, -x) == 0
    assert abs(alignment.nearest_similarity(x[:2], x) - 1) < 1e-12
    pairs = [(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    by_hand = np.mean([float(torch.cosine_similarity(a, b, 0)) for a, b in pairs])
    assert abs(alignment.image_oracle(x) - by_hand) < 1e-12
    assert abs(alignment.image_alignment(x, x) - (12 * by_hand + 4) / 16) < 1e-12


def test_normalised_alignment_is_one_for_matched_and_not_for_shuffled_captions() -> None:
    captions = torch.eye(5, dtype=torch.float64)
    assert abs(alignment.normalised_text_alignment(captions + 0.1, captions) - 1) < 1e-9
    assert alignment.normalised_text_alignment(captions.roll(1, 0), captions) < 0


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a <new1> cat on a beach", "a cat on a beach"), ("photo of <new1> <new1>_1 cat", "photo of cat"), ("cat", "cat")],
)
def test_metric_models_never_see_the_token(prompt: str, expected: str) -> None:
    assert alignment.without_token(prompt, "<new1>") == expected


def test_bootstrap_interval_holds_the_mean_and_narrows() -> None:
    few, many = _features(10, 1).flatten(), _features(1000, 1).flatten()
    for values in (few, many):
        low, high = alignment.interval(values)
        assert low < float(values.mean()) < high
    assert np.ptp(alignment.interval(many)) < np.ptp(alignment.interval(few)) / 3


@pytest.fixture(scope="module")
def metric_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random CLIP and a random ViT in stock layout."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    root = tmp_path_factory.mktemp("metric")
    torch.manual_seed(0)
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = ViTConfig(**layers, image_size=32, patch_size=8)
    ViTModel(vision, add_pooling_layer=False).save_pretrained(root / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "vit")
    return write_tiny_clip(root / "clip"), root / "vit"


DISTANCES = ("KID", "MMD (CMMD's kernel)")


def _evaluated(base_dir: Path, models: tuple[Path, Path], pictures: int, **more: Any) -> dict[str, Figure]:
    base = load_base(base_dir)
    adapter = LoRA(rank=2)  # untrained: draws what the base draws
    adapter.attach(base)
    references = np.random.default_rng(0).integers(0, 255, (pictures, 32, 32, 3), dtype=np.uint8)
    prompts = ["a photo of a <new1> cat", "a photo of a <new1> dog"]
    given = (references, prompts, models[0], "<new1>", models[1], (0, 1), SamplingOptions(steps=2))
    report = evaluate(base, [adapter], *given, **more)
    json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert report.prompts == prompts and all(figure.n == 4 for figure in report.figures.values())
    return report.figures


def test_evaluate_reports_value_oracle_and_floor(tiny_bases: dict[str, Path], metric_models: tuple[Path, Path]) -> None:
    matched = np.random.default_rng(1).integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)
    figures = _evaluated(tiny_bases["sd1"], metric_models, 5, matched=matched)
    expected = ["CLIP-I", "DINO-I", "nearest training picture", *TEXT_MEASURES]
    expected += [f"{d} {place} x 1000" for d in DISTANCES for place in ("to real pictures", "of the class to the base")]
    assert sorted(figures) == sorted(expected)
    for name, figure in figures.items():
        assert figure.floor is not None and figure.oracle is not None and not figure.without_oracle, name
    for name in (n for n in figures if "of the class" in n):
        # Drawn without token: an untrained adapter has not moved the class, and another draw is not the same.
        assert figures[name].value == pytest.approx(figures[name].floor, abs=1e-3) and figures[name].floor != 0
    clip, dino = Clip(metric_models[0]), Dino(metric_models[1])
    references = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), dtype=np.uint8)
    real = clip.images(references)
    assert figures["DINO-I"].oracle == alignment.image_oracle(dino.images(references))
    assert figures["nearest training picture"].oracle == alignment.nearest_oracle(real)
    assert figures["KID to real pictures x 1000"].oracle == pytest.approx(1000 * mmd2(real[[0, 2, 4]], real[[1, 3]]))
    assert figures["MMD (CMMD's kernel) to real pictures x 1000"].oracle == pytest.approx(
        1000 * mmd2(real[[0, 2, 4]], real[[1, 3]], "cmmd")
    )
    captions = clip.texts(["a photo of a cat"] * 2 + ["a photo of a dog"] * 2)
    assert figures["CLIP-T"].oracle == alignment.text_alignment(clip.images(matched), captions)


def test_the_base_is_compared_with_itself_on_other_seeds(
    tiny_bases: dict[str, Path], metric_models: tuple[Path, Path]
) -> None:
    figures = _evaluated(tiny_bases["sd1"], metric_models, 2)
    base, clip = load_base(tiny_bases["sd1"]), Clip(metric_models[0])
    prompts, options = ["a photo of a cat"] * 2 + ["a photo of a dog"] * 2, SamplingOptions(steps=2)
    first, second = (clip.images(generate(base, prompts, s, None, options)) for s in ([0, 1, 0, 1], [2, 3, 2, 3]))
    for label, kernel in zip(DISTANCES, ("kid", "cmmd"), strict=True):
        figure = figures[f"{label} of the class to the base x 1000"]
        assert figure.floor == pytest.approx(1000 * mmd2(first, second, kernel), abs=1e-4)


@pytest.mark.parametrize(("pictures", "reason"), [(1, "n < 2"), (3, "n < 4")])
def test_a_missing_oracle_says_why(
    tiny_bases: dict[str, Path], metric_models: tuple[Path, Path], pictures: int, reason: str
) -> None:
    figures = _evaluated(tiny_bases["sd1"], metric_models, pictures)
    assert figures["CLIP-T"].oracle is None and figures["CLIP-T"].without_oracle == "no captions"
    name = "CLIP-I" if pictures < 2 else "KID to real pictures x 1000"
    assert figures[name].oracle is None and figures[name].without_oracle == reason


def test_evaluate_refuses_nothing_to_compare(tiny_bases: dict[str, Path], metric_models: tuple[Path, Path]) -> None:
    references = np.zeros((1, 32, 32, 3), np.uint8)
    with pytest.raises(UsageError, match="at least one prompt"):
        evaluate(load_base(tiny_bases["sd1"]), [], references, [], metric_models[0])


def test_nearest_oracle_leaves_the_picture_itself_out() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    by_hand = np.mean([0.5**0.5, 0.5**0.5, -(0.5**0.5)])
    assert abs(alignment.nearest_oracle(x) - by_hand) < 1e-6
    assert np.isnan(alignment.nearest_oracle(x[:1]))


def test_features_do_not_depend_on_the_batch(metric_models: tuple[Path, Path]) -> None:
    pictures = np.random.default_rng(0).integers(0, 255, (3, 40, 40, 3), dtype=np.uint8)
    for kind, path in ((Clip, metric_models[0]), (Dino, metric_models[1])):
        torch.testing.assert_close(kind(path, batch=1).images(pictures), kind(path, batch=3).images(pictures))


def test_missing_metric_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="CLIP directory .* has no config.json"):
        Clip(tmp_path)


def test_which_clip_judges() -> None:
    assert clip_directory("here", "tinyworld") == Path("here")
    assert (clip_directory(None, "tinyworld") / "config.json").is_file()
    with pytest.raises(UsageError, match="no CLIP to judge"):
        clip_directory("", "sd15")


def test_the_embedded_clip_finds_the_caption_of_an_unseen_picture() -> None:
    right = caption_retrieval(Path(clip_directory(None, "tinyworld")), pictures=96)
    assert 0.85 < right <= 1, "one in 96 by chance"


def test_dreambooth_suite_is_read_in_its_published_layout(tmp_path: Path) -> None:
    lines = [
        "subject_name,class", "backpack,backpack", "cat2,cat", "", "Prompts", "", "prompt_list = [",
        "'a {0} {1} in the jungle'.format(unique_token, class_token),",
        "'a cube shaped {0} {1}'.format(unique_token, class_token)", "]", "", "prompt_list = [",
        "'a {0} {1} wearing a red hat'.format(unique_token, class_token)", "]",
    ]  # fmt: skip
    data = tmp_path / "dataset"
    for name in ("backpack", "cat2"):
        (data / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(data / name / "00.jpg")
    (data / "prompts_and_classes.txt").write_text("\n".join(lines))
    first, second = dreambooth(tmp_path)
    assert first.prompts == ("a <new1> backpack in the jungle", "a cube shaped <new1> backpack")
    assert second.prompts == ("a <new1> cat wearing a red hat",) and len(second.pictures) == 1
    (data / "cat2" / "00.jpg").unlink()
    with pytest.raises(DataError, match="cat2"):
        list(dreambooth(tmp_path))


def test_customconcept101_is_read_in_its_published_layout(tmp_path: Path) -> None:
    (tmp_path / "benchmark_dataset" / "scene_barn").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "benchmark_dataset" / "scene_barn" / "1.png")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "barn.txt").write_text("{} in snow\na painting of {}\n")
    entry = {
        "instance_prompt": "photo of a <new1> barn", "class_prompt": "barn",
        "instance_data_dir": "./benchmark_dataset/scene_barn", "class_data_dir": "./regularization/barn",
        "prompt_filename": "prompts/barn.txt",
    }  # fmt: skip
    (tmp_path / "dataset.json").write_text(json.dumps([entry]))
    (subject,) = customconcept101(tmp_path)
    assert subject.prompts == ("<new1> barn in snow", "a painting of <new1> barn")
    with pytest.raises(DataError, match="dataset.json is missing"):
        list(customconcept101(tmp_path / "prompts"))
