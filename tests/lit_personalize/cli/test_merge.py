"""`litp merge`: files in, one verified adapter out; what cannot be merged is one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lit_personalize
from lit_personalize.adapters.full_weights import FullWeights
from lit_personalize.adapters.key_value_delta import KeyValueDelta
from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.protocol import Adapter, AdapterWeights
from lit_personalize.adapters.token_embedding import TokenEmbedding
from lit_personalize.backbones.loading import load_base
from lit_personalize.cli.console import configure_logging
from lit_personalize.cli.main import main
from lit_personalize.errors import UsageError
from lit_personalize.export.exporter import export
from lit_personalize.export.loading import read_adapter
from lit_personalize.export.pipeline import write_pipeline

Make = Callable[..., AdapterWeights]
CONTENT, STYLE = "unet.up_blocks.0.attentions.0", "unet.up_blocks.0.attentions.1"


@pytest.fixture
def make(tiny_bases: dict[str, Path], tmp_path: Path) -> Make:
    """Write an adapter's files into a folder."""
    configure_logging()  # before the first base is loaded: no bars among the errors

    def made(family: str, name: str, *adapters: Adapter, formats: tuple[str, ...] = ("diffusers",)) -> AdapterWeights:
        base, weights = load_base(tiny_bases[family]), AdapterWeights()
        for adapter in adapters:
            adapter.attach(base)
            with torch.no_grad():
                for factor in adapter.named_factors().values():
                    factor.add_(0.1 * torch.randn(factor.shape))
            weights = weights.merge(adapter.export_weights())
        export(weights, tmp_path / name, base, name, list(formats))
        return weights

    return made


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_merge_is_verified_and_is_the_sum(
    tiny_bases: dict[str, Path], tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    one = make(family, "one", LoRA(rank=2, alpha=5.0, text_encoder=True), TokenEmbedding("<new1>", "cat"))
    two = make(family, "two", KeyValueDelta(), TokenEmbedding("<new1>", "dog"), formats=("delta",))
    (tmp_path / "run").mkdir()
    (tmp_path / "two").rename(tmp_path / "run" / "exports")
    base = ["--base", str(tiny_bases[family]), "-o", str(tmp_path / "merged")]
    files = [str(tmp_path / "one"), f"{tmp_path / 'run'}@0.5"]
    assert main(["merge", "linear", *files, *base]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "<new1> is in" in error and "--rename '2:<new1>=<other>'" in error
    assert not (tmp_path / "merged").exists()
    rename = ["--rename", "2:<new1>=<new2>", "--block", "2:mid_block=0", "--formats", "diffusers", "kohya", "peft"]
    assert main(["merge", "linear", *files, *rename, *base, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["energy_kept"] == pytest.approx(1, abs=1e-9) and report["verified"]["largest_error"] <= 1e-6
    assert report["verified"]["picture_difference"] <= 1 / 255 + 1e-6
    assert report["tokens"] == ["<new1>", "<new2>"]
    assert report == json.loads((tmp_path / "merged" / "merge.json").read_text())
    loaded = read_adapter(tmp_path / "merged", load_base(tiny_bases[family]))
    assert torch.equal(loaded.tokens["<new2>"][0], two.tokens["<new1>"][0])
    for layer in {*one.layers(), *two.layers()}:
        wanted = torch.zeros(())
        wanted = wanted + one.delta(layer) if layer in one.layers() else wanted
        wanted = wanted + 0.5 * two.delta(layer) if layer in two.layers() and "mid_block" not in layer else wanted
        torch.testing.assert_close(loaded.delta(layer), wanted, atol=1e-5, rtol=1e-5)


def test_content_of_one_and_style_of_another(
    tiny_bases: dict[str, Path], tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = make("sdxl", "one", LoRA(rank=2)), make("sdxl", "two", LoRA(rank=3, alpha=6.0, targets="key_value"))
    base, names = str(tiny_bases["sdxl"]), [str(tmp_path / n) for n in ("one", "two")]
    command = ["merge", "blora", "--content", names[0], "--style", f"{names[1]}@1.1", "--base", base]
    assert main([*command, "-o", str(tmp_path / "mixed"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["energy_kept"] == 1 and report["verified"]["largest_error"] <= 1e-6
    assert main([*command, "--scale", "reference", "--no-verify", "-o", str(tmp_path / "squared")]) == 0
    fresh = load_base(base)
    mixed, squared = (read_adapter(tmp_path / name, fresh) for name in ("mixed", "squared"))
    wanted = {layer for layer in one.layers() if layer.startswith(CONTENT)}
    wanted |= {layer for layer in two.layers() if layer.startswith(STYLE)}
    assert set(mixed.layers()) == set(squared.layers()) == wanted
    for layer in wanted:
        source, strengths = (one, (1, 1)) if layer.startswith(CONTENT) else (two, (1.1, 1.21))
        for found, strength in zip((mixed, squared), strengths, strict=True):
            torch.testing.assert_close(found.delta(layer), strength * source.delta(layer), atol=1e-6, rtol=1e-5)
    capsys.readouterr()
    assert main(["merge", "blora", "--base", base, "-o", str(tmp_path / "none")]) == 2
    assert "--content, --style, or both" in capsys.readouterr().err
    assert main(["merge", "blora", "--style", names[0], "--base", str(tiny_bases["sd1"]), "-o", "x"]) == 2
    assert "are those of SDXL" in capsys.readouterr().err


def test_a_tuned_model_becomes_an_adapter(
    tiny_bases: dict[str, Path], tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = make("sd1", "one", LoRA(rank=2, targets="blocks", text_encoder=True), TokenEmbedding("<new1>", "cat"))
    tuned = write_pipeline(weights, load_base(tiny_bases["sd1"]), tmp_path / "tuned")
    base = ["--base", str(tiny_bases["sd1"])]
    command = ["merge", "extract", *base, "--tuned", str(tuned), "--rank", "1", "-o", str(tmp_path / "out"), "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ranks"] == {"1": len(weights.layers())} and report["tokens"] == ["<new1>"]
    whole = sum(float(weights.delta(n).square().sum()) for n in weights.layers())
    best = sum(float(torch.linalg.svdvals(weights.delta(n))[0] ** 2) for n in weights.layers())
    assert (
        report["energy_kept"] == pytest.approx(best / whole, rel=1e-4) and report["verified"]["largest_error"] <= 1e-6
    )
    same = ["merge", "extract", *base, "--tuned", str(tiny_bases["sd1"]), "-o", str(tmp_path / "same")]
    assert main(same) == 3
    assert "there is no difference" in capsys.readouterr().err


def test_bad_input_is_one_sentence(
    tiny_bases: dict[str, Path], tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    make("sd1", "one", LoRA(rank=1), TokenEmbedding("<new1>", "cat"))
    make("sd1", "two", LoRA(rank=1))
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    base, out = ["--base", str(tiny_bases["sd1"])], ["-o", str(tmp_path / "out")]

    def refused(code: int, says: str, *arguments: str) -> None:
        assert main(["merge", *arguments]) == code
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, error

    refused(2, "name two adapters or more", "linear", *base, *out)
    refused(2, "one adapter is nothing to merge", "ties", one, *base, *out)
    refused(2, "rank must be at least 1, not 0", "svd", one, two, "--rank", "0", *base, *out)
    refused(2, "rank must be at least 1, not 0", "extract", "--tuned", one, "--rank", "0", *base, *out)
    refused(3, "was trained on base", "linear", one, two, "--base", str(tiny_bases["sdxl"]), *out)
    refused(3, "does not exist", "linear", one, str(tmp_path / "three"), *base, *out)
    refused(2, "'strong' behind the @", "linear", one, "two@strong", *base, *out)
    refused(2, "PATTERN=FACTOR", "linear", one, two, "--block", "mid", *base, *out)
    refused(2, "no layer of", "linear", one, two, "--block", "up_blocks.9=0", *base, *out)
    refused(2, "N:TOKEN=NEW", "linear", one, two, "--rename", "<new1>=<new2>", *base, *out)
    refused(2, "has no token <new2>", "linear", one, two, "--rename", "1:<new2>=<new3>", *base, *out)
    refused(2, "already; choose another", "linear", one, two, "--rename", "1:<new1>=cat", *base, *out)
    refused(2, "there are 2 adapters", "linear", one, two, "--rename", "3:<new1>=<new2>", *base, *out)
    refused(2, "holds an adapter that is to be merged", "linear", one, two, *base, "-o", one)
    refused(2, "unknown export format 'onnx'", "linear", one, two, *base, *out, "--formats", "onnx")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    refused(2, "holds other files", "linear", one, two, *base, "-o", str(tmp_path / "full"))
    make("sd1", "whole", FullWeights(), formats=("delta",))
    for mode in ("linear", "interpolate"):
        refused(2, "norms, biases or embeddings, such as unet.", mode, two, str(tmp_path / "whole"), *base, *out)
    assert not (tmp_path / "out").exists()


def test_the_same_folder_again_holds_the_new_merge_alone(
    tiny_bases: dict[str, Path], tmp_path: Path, make: Make
) -> None:
    make("sd1", "one", LoRA(rank=1), TokenEmbedding("<new1>", "cat"), TokenEmbedding("<new2>", "dog"))
    make("sd1", "two", LoRA(rank=1))
    options: dict[str, Any] = {"base": str(tiny_bases["sd1"]), "verify": False}
    one, two, out = tmp_path / "one", tmp_path / "two", tmp_path / "out"
    report = lit_personalize.merge("svd", [(one, 0.5), two], out, rank=1, **options)
    assert report.adapters[0]["strength"] == 0.5 and 0 < report.energy_kept < 1 and report.ranks.keys() == {"1"}
    assert len(list(out.glob("learned_embeds*"))) == 2
    lora = one / "pytorch_lora_weights.safetensors"
    report = lit_personalize.merge("concat", [lora, two], out, **options)
    assert not list(out.glob("learned_embeds*")) and report.tokens == [] and report.energy_kept == 1
    assert sorted(p.name for p in out.iterdir()) == sorted([*report.files, "merge.json"])
    with pytest.raises(UsageError, match="one adapter"):
        lit_personalize.merge("linear", [lora], out, **options)
