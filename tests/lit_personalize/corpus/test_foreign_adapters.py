"""Adapters of other programs as rows: PEFT folders, kohya files, and Weights2Weights' layout both ways."""

from __future__ import annotations

import csv
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import load_file, save_file

from lit_personalize.adapters.protocol import AdapterWeights
from lit_personalize.backbones.base import Base
from lit_personalize.cli.main import main
from lit_personalize.corpus.packing import pack
from lit_personalize.corpus.store import Corpus
from lit_personalize.corpus.w2w_files import write
from lit_personalize.errors import DataError, UsageError
from lit_personalize.export.exporter import export

Make = Callable[..., AdapterWeights]


def assert_same(found: AdapterWeights, wanted: AdapterWeights, precision: float = 1e-3) -> None:
    assert set(found.layers()) == set(wanted.layers())
    for layer in wanted.layers():
        delta = wanted.delta(layer)
        assert float((found.delta(layer) - delta).norm()) <= precision * float(delta.norm())


@pytest.fixture
def peft_folders(base: Base, make_weights: Make, tmp_path: Path) -> Path:
    """As Weights2Weights lays them out: `<id>/unet/`, an adapter's name in every key, alpha 27."""
    for number in range(3):
        folder = tmp_path / "peft" / f"id{number}"
        (written,) = export(make_weights(number, alpha=27.0), tmp_path / f"own{number}", base, "own", ["peft"])
        (folder / "unet").mkdir(parents=True)
        tensors = load_file(written.path / "adapter_model.safetensors")
        renamed = {key.replace(".weight", ".identity1.weight"): tensor for key, tensor in tensors.items()}
        save_file(renamed, folder / "unet" / "adapter_model.safetensors")
        (folder / "unet" / "adapter_config.json").write_bytes((written.path / "adapter_config.json").read_bytes())
    return tmp_path / "peft"


def test_peft_folders_and_kohya_files(base: Base, make_weights: Make, peft_folders: Path, tmp_path: Path) -> None:
    """Nothing says where they began: they want a corpus of unknown gauge, or someone who knows."""
    with pytest.raises(DataError, match="adapter 'id0' does not say from which seed .*--gauge unknown"):
        pack(peft_folders, tmp_path / "c", base)
    assert not (tmp_path / "c").exists()
    assert pack(peft_folders, tmp_path / "c", base, gauge="unknown").packed == 3
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.ids == ["id0", "id1", "id2"] and set(corpus.layout.alphas.values()) == {27.0}
    assert_same(corpus.adapter("id2"), make_weights(2, alpha=27.0))
    (kohya,) = export(make_weights(5, alpha=27.0), tmp_path / "kohya", base, "k5", ["kohya"])
    assert pack(kohya.path, tmp_path / "c", base).packed == 1  # the same layout, and alpha
    assert_same(Corpus.open(tmp_path / "c").adapter(kohya.path.stem), make_weights(5, alpha=27.0))
    assert pack(peft_folders, tmp_path / "stated", base, init_seed=3).gauge == "known"
    assert Corpus.open(tmp_path / "stated").index["init_seed"].to_pylist() == [3, 3, 3]


def w2w_folder(peft_folders: Path, folder: Path) -> Path:
    """Made as the authors' scripts do it: PEFT's weights in the order of their keys, flattened."""
    folder.mkdir()
    rows, dimensions = [], OrderedDict()
    for path in sorted(peft_folders.iterdir()):
        tensors = OrderedDict(load_peft_weights(str(path / "unet"), device="cpu"))
        rows.append(torch.cat([tensor.flatten() for tensor in tensors.values()]))
        dimensions = OrderedDict((key, (tensor.flatten().shape, tensor.shape)) for key, tensor in tensors.items())
    torch.save(torch.stack(rows), folder / "all_weights.pt")
    torch.save(dimensions, folder / "weight_dimensions.pt")
    return folder


def test_weights2weights_rows_come_and_go(
    base: Base, make_weights: Make, peft_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the corpus writes in their layout loads as weights alone, and is what came; also from files of adapters."""
    folder = w2w_folder(peft_folders, tmp_path / "w2w")
    (folder / "identity_df.csv").write_text(",Male,Young\np0,1,-1\np1,-1,1\np2,-1,-1\n")  # as pandas writes it
    with pytest.raises(DataError, match="alpha is not among the numbers"):
        pack(folder, tmp_path / "c", base)
    command = ["bank", "pack", str(folder), "--corpus", str(tmp_path / "c"), "--base", str(base.source)]
    command += ["--alpha", "27", "--init-seed", "0", "--dtype", "float32", "--json"]
    assert main([*command, "--labels", str(folder / "identity_df.csv")]) == 0
    assert json.loads(capsys.readouterr().out)["labels"] == {"Male": 3, "Young": 3}
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.ids == ["p0", "p1", "p2"] and corpus.labels()["Male"].tolist() == [1, -1, -1]
    assert torch.equal(corpus.gather(range(3)), torch.load(folder / "all_weights.pt", weights_only=True))
    for number in range(3):
        assert_same(corpus.adapter(f"p{number}"), make_weights(number, alpha=27.0), 1e-6)

    out = tmp_path / "back"
    get = ["bank", "get", "--all", "--corpus", str(tmp_path / "c"), "--out", str(out), "--formats", "w2w"]
    assert main(get) == 0
    rows, dimensions = (torch.load(out / f"{n}.pt", weights_only=True) for n in ("all_weights", "weight_dimensions"))
    assert torch.equal(rows, torch.load(folder / "all_weights.pt", weights_only=True))
    theirs = torch.load(folder / "weight_dimensions.pt", weights_only=True)
    assert [key.replace(".identity1", "") for key in theirs] == list(dimensions)
    assert [tuple(shape) for _, shape in theirs.values()] == [shape for _, shape in dimensions.values()]
    assert json.loads((out / "adapter_config.json").read_text())["lora_alpha"] == 27
    with (out / "identity_df.csv").open() as file:
        assert list(csv.reader(file)) == [["id", "Male", "Young"], ["p0", "1.0", "-1.0"], ["p1", "-1.0", "1.0"],
                                          ["p2", "-1.0", "-1.0"]]  # fmt: skip
    assert not list(out.glob(".tmp*"))
    assert main(get) == 2
    assert pack(out, tmp_path / "again", base, init_seed=0, dtype="float32").packed == 3  # alpha from its configuration
    assert torch.equal(Corpus.open(tmp_path / "again").gather(range(3)), rows)


def test_columns_in_another_order(base: Base, make_weights: Make, peft_folders: Path, tmp_path: Path) -> None:
    folder = w2w_folder(peft_folders, tmp_path / "w2w")
    rows, dimensions = (torch.load(folder / f"{n}.pt", weights_only=True) for n in ("all_weights", "weight_dimensions"))
    parts = dict(zip(dimensions, rows.split([size[0] for size, _ in dimensions.values()], dim=1), strict=True))
    torch.save(torch.cat([parts[key] for key in reversed(parts)], dim=1), folder / "all_weights.pt")
    torch.save(OrderedDict((key, dimensions[key]) for key in reversed(dimensions)), folder / "weight_dimensions.pt")
    pack(folder, tmp_path / "c", base, gauge="unknown", alpha=27.0, dtype="float32")
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.ids == ["000000", "000001", "000002"]
    assert torch.equal(corpus.gather(range(3)), rows)


def test_pickles_that_could_run_code_are_refused(base: Base, peft_folders: Path, tmp_path: Path) -> None:
    folder = w2w_folder(peft_folders, tmp_path / "w2w")
    dimensions = (folder / "weight_dimensions.pt").read_bytes()
    torch.save({"x": Path("/")}, folder / "weight_dimensions.pt")
    with pytest.raises(DataError, match="could run code"):
        pack(folder, tmp_path / "c", base, gauge="unknown", alpha=27.0)
    (folder / "weight_dimensions.pt").write_bytes(dimensions)
    torch.save(torch.zeros(3, 5), folder / "all_weights.pt")
    with pytest.raises(DataError, match="rows of 5 numbers"):
        pack(folder, tmp_path / "c", base, gauge="unknown", alpha=27.0)
    torch.save(Path("/"), folder / "all_weights.pt")
    with pytest.raises(DataError, match="could run code"):
        pack(folder, tmp_path / "c", base, gauge="unknown", alpha=27.0)
    torch.save({}, tmp_path / "peft" / "one.pt")
    with pytest.raises(DataError, match="is a pickle: take its weights out with litp import"):
        pack(tmp_path / "peft", tmp_path / "c", base, gauge="unknown")


def test_what_their_layout_cannot_say(base: Base, make_weights: Make, finish: Make, tmp_path: Path) -> None:
    pack(finish("a", make_weights(0, text_encoder=True)), tmp_path / "c", base)
    with pytest.raises(UsageError, match="is the UNet's"):
        write(Corpus.open(tmp_path / "c"), ["a"], tmp_path / "w2w")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no adapter"):
        pack(tmp_path / "empty", tmp_path / "d", base)
    assert not (tmp_path / "d").exists()
