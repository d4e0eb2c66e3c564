"""`litp merge closed-form`: every concept's words keep their meaning, captions keep theirs, clients load the result."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from lit_personalize.adapters.key_value_delta import KeyValueDelta
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.adapters.token_embedding import TokenEmbedding
from lit_personalize.backbones.loading import load_base
from lit_personalize.cli.main import main
from lit_personalize.errors import UsageError
from lit_personalize.export.exporter import export
from lit_personalize.export.loading import load_adapter
from lit_personalize.merging.closed_form import Concept, distinct, without_repeats

WORDS = ("red", "blue", "toy", "beach", "ktn", "pll", "picture", "a", "xylophone", "on", "quilt", "vim")
CAPTIONS = [" ".join(words) for words in itertools.permutations(WORDS, 2)]


def learned(path: Path, token: str, word: str, seed: int, vectors: int = 1) -> AdapterWeights:
    """A Custom Diffusion adapter moved away from its start."""
    base = load_base(path)
    adapters = [KeyValueDelta(), TokenEmbedding(token, word, vectors)]
    draws = torch.Generator().manual_seed(seed)
    weights = AdapterWeights()
    for adapter in adapters:
        adapter.attach(base)
        with torch.no_grad():
            for factor in adapter.named_factors().values():
                factor.add_(0.1 * torch.randn(factor.shape, generator=draws))
        weights = weights.merge(adapter.export_weights())
    return weights


def made(root: Path, base: Path, formats: tuple[str, ...] = ("delta",)) -> list[AdapterWeights]:
    """Two concepts as files in root/cat and root/dog, both called <new1>, and the captions in root/captions.txt."""
    found = [learned(base, "<new1>", "cat", 1, vectors=2), learned(base, "<new1>", "dog", 2)]
    for name, weights in zip(("cat", "dog"), found, strict=True):
        export(weights, root / name, load_base(base), name, formats)
    (root / "captions.txt").write_text("\n".join(CAPTIONS))
    return found


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_words_mean_what_they_meant_to_each_concept(
    tiny_bases: dict[str, Path], tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_bases[family]
    learnt = made(tmp_path, path)
    command = ["merge", "closed-form", "--base", str(path), "--captions", str(tmp_path / "captions.txt"), "--json"]
    command += ["--ridge", "1e-9"]  # a final norm that is not trained leaves states in a plane
    for noun in ("cat", "dog"):
        command += ["--concept", str(tmp_path / noun), noun]
    assert main([*command, "-o", str(tmp_path / "merged"), "--formats", "diffusers", "kohya", "peft"]) == 0
    written = json.loads(capsys.readouterr().out)
    report = written["extra"]
    assert report["concepts"] == {"<new1>": "cat", "<new2>": "dog"} and report["largest miss of a target"] < 1e-4
    assert report["rank"] == 2 * 4 + 2 * 3, "of two sentences each, with the end token"
    assert report["change on captions"] < report["change on captions by addition"]

    base = load_base(path)
    merged = load_adapter(tmp_path / "merged", base)
    tokenizer = base.tokenizers[0]
    for token, noun, weights in (("<new1> <new1>_1", "cat", learnt[0]), ("<new2>", "dog", learnt[1])):
        for sentence, skipped in ((f"{token} {noun}", 0), (f"photo of a {token} {noun}", 3)):
            ids = base.tokenize([sentence])
            words = 1 + len(tokenizer(sentence, add_special_tokens=False).input_ids)  # and the end token
            with torch.no_grad():
                states = base.encode_text(ids)[0][0, 1 + skipped : 1 + words]
            for layer in weights.layers():
                wanted, got = states @ weights.delta(layer).T, states @ merged.delta(layer).T
                torch.testing.assert_close(got, wanted, atol=2e-4 * float(wanted.abs().max()), rtol=0)
    assert sorted(merged.layers()) == sorted(learnt[0].layers()) and written["verified"]["largest_error"] < 1e-6


def test_tokens_and_repeats() -> None:
    rows = torch.ones(1, 4)
    concepts = [Concept(AdapterWeights(tokens={name: [rows]}), "cat") for name in ("<a>", "<new1>", "<a>", "<a>")]
    assert [c.token for c in distinct(concepts)] == ["<a>", "<new1>", "<new2>", "<new3>"]
    parts = without_repeats([torch.tensor([[1.0], [2.0], [1.0]]), torch.tensor([[2.0], [3.0]])])
    assert [part.flatten().tolist() for part in parts] == [[1, 2], [3]]


def test_wrong_input_is_one_sentence(
    tiny_bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path, tiny_bases["sd1"])
    start = ["merge", "closed-form", "--base", str(tiny_bases["sd1"]), "-o", str(tmp_path / "out")]
    captions, few = ["--captions", str(tmp_path / "captions.txt")], ["--captions", str(tmp_path / "few.txt")]
    (tmp_path / "few.txt").write_text("a cat\n\na dog\n")
    (tmp_path / "empty.txt").write_text("\n")
    both = ["--concept", str(tmp_path / "cat"), "cat", "--concept", str(tmp_path / "dog"), "dog"]
    for given, code, said in (
        ([*both[:3], *captions], 2, "at least two concepts"),
        ([*both, *captions], 2, "660 states of the regularization captions span 31 of 32 dimensions"),
        ([*both, *few], 2, "6 states of the regularization captions span 5 of 32 dimensions: give more captions, or"),
        ([*both, "--captions", str(tmp_path / "empty.txt")], 3, "holds no caption"),
        ([*both, "--captions", str(tmp_path / "none.txt")], 3, "cannot read captions from"),
        (["--concept", str(tmp_path / "none"), "cat", *both[:3], *captions], 3, "does not exist"),
    ):
        capsys.readouterr()
        assert main([*start, *given]) == code, given
        assert said in capsys.readouterr().err
    assert main([*start, *both, *few, "--ridge", "1e-6"]) == 0
    with pytest.raises(SystemExit, match="2"):
        main(["merge", "closed"])


def test_what_is_no_concept_of_custom_diffusion(tiny_bases: dict[str, Path]) -> None:
    from lit_personalize.merging.closed_form import merge_concepts

    base = load_base(tiny_bases["sd1"])
    good = Concept(learned(tiny_bases["sd1"], "<new1>", "cat", 1), "cat")
    no_token = Concept(AdapterWeights(dense=good.weights.dense), "dog")
    elsewhere = AdapterWeights(dense={"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": torch.ones(2, 2)},
                               tokens={"<b>": [torch.ones(1, 32)]})  # fmt: skip
    nothing = AdapterWeights(tokens={"<b>": [torch.ones(1, 32)]})
    for wrong, said in ((no_token, "'dog' has 0 tokens"), (Concept(elsewhere, "dog"), "changes unet.mid_block"),
                        (Concept(nothing, "dog"), "changes no K or V")):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            merge_concepts(base, [good, wrong], CAPTIONS)
