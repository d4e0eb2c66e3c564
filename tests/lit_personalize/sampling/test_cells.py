"""Strengths by block, and grids in which every cell is the picture drawn alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_personalize.adapters.loaded import LoadedAdapter, strengths_of
from lit_personalize.adapters.lora import LoRA
from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.backbones.loading import load_base
from lit_personalize.cli.main import main
from lit_personalize.errors import UsageError
from lit_personalize.export.exporter import export
from lit_personalize.sampling.cells import draw_cells, source_of, split_strengths
from lit_personalize.sampling.sampler import SamplingOptions, generate

QUICK = SamplingOptions(steps=2, guidance=2.0)


@pytest.fixture(scope="module")
def loras(tiny_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of UNet and text encoder, both with a token `<new1>`, the first of two vectors."""
    places = []
    for seed in range(2):
        base, adapter = load_base(tiny_bases["sd1"]), LoRA(rank=2, text_encoder=True)
        adapter.attach(base, seed)
        with torch.no_grad():
            for factor in adapter.factors.values():
                factor.add_(torch.randn(factor.shape, generator=torch.Generator().manual_seed(seed)) * 0.3)
        weights = adapter.export_weights()
        weights.tokens = {"<new1>": [torch.randn(2 - seed, 32, generator=torch.Generator().manual_seed(seed))]}
        places.append(tmp_path_factory.mktemp(f"lora-{seed}"))
        export(weights, places[-1], base, f"lora-{seed}", ["diffusers"])
    return places


def test_a_part_of_a_name_is_whole_words() -> None:
    layers = [
        "unet.up_blocks.1.attn1.to_k",
        "unet.up_blocks.10.attn2.to_k",
        "unet.mid_block.attn2.to_v",
        "text_encoder.q",
    ]

    def matched(part: str) -> list[int]:
        return [layers.index(layer) for layer in strengths_of(layers, {part: 0.5}, "a")]

    assert matched("up_blocks.1") == [0] and matched("up_blocks") == [0, 1] and matched("attn2") == [1, 2]
    assert matched("up_blocks.*.attn2") == [1] and matched("to_*") == [0, 1, 2] and matched("text_encoder") == [3]
    assert strengths_of(layers, {"unet": 0.5, "mid_block": 0.0}, "a") == dict(
        zip(layers[:3], [0.5, 0.5, 0.0], strict=True)
    )
    for wrong in ("up_block", "blocks.1", "", "up.blocks"):
        with pytest.raises(
            UsageError, match="it changes unet.up_blocks.1, unet.up_blocks.10, unet.mid_block, text_encoder$"
        ):
            strengths_of(layers, {wrong: 1.0}, "a")
    with pytest.raises(UsageError, match="it changes tokens only"):
        LoadedAdapter(AdapterWeights(tokens={"<t>": []}), blocks={"unet": 1.0})


def test_every_layer_gets_its_strength(tiny_bases: dict[str, Path], loras: list[Path]) -> None:
    base = load_base(tiny_bases["sd1"])
    adapter = source_of(f"{loras[0]}@0.5,text_encoder=0,up_blocks.0=-2").attach(base)
    parts = {**{f"unet.{n}": m for n, m in base.unet.named_modules()},
             **{f"text_encoder.{n}": m for n, m in base.text_encoders[0].named_modules()}}  # fmt: skip
    seen = set()
    for layer in adapter.layers():
        factor = 0.0 if layer.startswith("text_encoder") else -1.0 if ".up_blocks.0." in layer else 0.5
        applied = parts[layer].weight - parts[layer]._parameters["weight"]
        assert torch.allclose(applied, factor * adapter.delta(layer).reshape(applied.shape), atol=1e-6), layer
        seen.add(factor)
    assert seen == {0.0, -1.0, 0.5}


def test_strengths_of_text_encoders_reach_the_states(tiny_bases: dict[str, Path], loras: list[Path]) -> None:
    base = load_base(tiny_bases["sd1"])
    untouched = base.condition(["a cat"]).states
    adapter = source_of(f"{loras[0]}@unet=0").attach(base)
    full = base.condition(["a cat"]).states
    adapter.scale = 0.5
    adapter.refresh(base.dtype)
    half = base.condition(["a cat"]).states
    distances = [float((states - untouched).norm()) for states in (half, full)]
    assert 0 < distances[0] < distances[1]


def test_an_entry_is_a_path_and_strengths(tmp_path: Path) -> None:
    (tmp_path / "a@b").mkdir()
    assert split_strengths(str(tmp_path / "a@b")) == (tmp_path / "a@b", 1.0, {})
    assert split_strengths("x@0.8") == (Path("x"), 0.8, {})
    assert split_strengths("x@0.8,mid_block=0, up_blocks.1=.5") == (
        Path("x"),
        0.8,
        {"mid_block": 0.0, "up_blocks.1": 0.5},
    )
    assert split_strengths("x@mid_block=0") == (Path("x"), 1.0, {"mid_block": 0.0})
    for wrong in ("x@", "x@a", "x@0.8,0.5", "x@=1", "x@mid_block=", "x@nan", "x@mid=inf"):
        with pytest.raises(UsageError, match="behind the @ is no strength; write FILE@0.8"):
            split_strengths(wrong)


def test_every_cell_is_the_picture_drawn_alone(tiny_bases: dict[str, Path], loras: list[Path]) -> None:
    """Though both adapters bring the token, and with other numbers of vectors."""
    load = partial(load_base, tiny_bases["sd1"])
    entries = [f"{loras[0]}@0.5", f"{loras[1]}@up_blocks=0"]
    prompts, seeds, strengths = ["a <new1> cat", "a dog"], [3, 4], [0.0, 1.0, 2.0]
    cells = draw_cells(load, prompts, seeds, [[source_of(e)] for e in entries], strengths, QUICK)
    assert cells.pictures.shape == (2, 2, 2, 3, 32, 32, 3)
    for group, (place, given) in enumerate(((loras[0], "@{}"), (loras[1], "@{},up_blocks=0"))):
        for column, strength in enumerate(strengths):
            base = load()
            own = strength * (0.5 if group == 0 else 1.0)
            adapter = source_of(f"{place}{given.format(own)}").attach(base)
            for row, prompt in enumerate(prompts):
                alone = generate(base, [prompt], [4], [adapter], QUICK)[0]
                cell = cells.pictures[row, 1, group, column]
                assert np.abs(alone.astype(int) - cell).max() <= 1, (prompt, place, strength)
    assert np.array_equal(cells.pictures[1, :, 0, 0], generate(load(), ["a dog"] * 2, seeds, None, QUICK))
    assert not np.array_equal(cells.pictures[1, 0, 0, 1], cells.pictures[1, 0, 0, 2])
    rows, columns = cells.axes()
    assert rows == [(p, f"seed {s}") for p in prompts for s in seeds]
    assert [inner for _, inner in columns] == ["strength 0", "strength 1", "strength 2"] * 2
    assert columns[3][0] == f"{loras[1].name} @ up_blocks=0"
    for r, c in ((0, 0), (1, 2), (3, 5)):
        assert np.array_equal(cells.table()[r, c], cells.pictures[r // 2, r % 2, c // 3, c % 3])


def test_seeds_go_across_where_nothing_else_does(tiny_bases: dict[str, Path]) -> None:
    cells = draw_cells(partial(load_base, tiny_bases["sd1"]), ["a cat", "a dog"], [1, 2], options=QUICK)
    assert cells.axes() == ([("a cat", ""), ("a dog", "")], [("", "seed 1"), ("", "seed 2")])
    assert np.array_equal(cells.table()[1, 0], cells.pictures[1, 0, 0, 0])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--grid"], "--grid and --strengths are of adapters: name one with --adapter"),
        (["--strengths", "0", "1"], "--grid and --strengths are of adapters"),
        (
            ["--adapter", "LORA@up_block=1"],
            "no layer that it changes has 'up_block' in its name; it changes text_encoder, ",
        ),
        (["--adapter", "LORA@strong"], "'strong' behind the @ is no strength"),
        (["--adapter", "LORA", "--adapter", "LORA"], "two adapters are named"),
    ],
)
def test_wrong_input_gets_one_sentence(
    tiny_bases: dict[str, Path], loras: list[Path], more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [part.replace("LORA", str(loras[0])) for part in more]
    assert main(["sample", "a cat", "--base", str(tiny_bases["sd1"]), "--steps", "1", *given]) == 2
    message = capsys.readouterr().err
    assert said in message and "Traceback" not in message
    assert len([line for line in message.splitlines() if line.startswith("litp sample: ")]) == 1
