"""A corpus on disk: what goes in comes out, whoever is killed, and damage is named."""

from __future__ import annotations

import json
import os
import random
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lit_personalize.cli.main import main
from lit_personalize.corpus.index import shards_of, write_index
from lit_personalize.corpus.layout import Layout
from lit_personalize.corpus.store import Corpus
from lit_personalize.errors import DataError, RunLockedError, UsageError

SHAPES = {f"unet.blocks.{i}.to_q": ((1, 40), (30, 1)) for i in range(3)}
LAYOUT = Layout.from_shapes(SHAPES, dict.fromkeys(SHAPES, 1.0))
PRECISION = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}


def new(folder: Path, **options: object) -> Corpus:
    given = {"base_fingerprint": "base", "init_seed": 0, "shard_rows": 4, **options}
    return Corpus.create(folder, LAYOUT, **given)  # type: ignore[arg-type]


def drawn(n: int, small: float = 1.0) -> Tensor:
    """Rows; B's numbers `small` times as large as A's."""
    rows = torch.randn(n, LAYOUT.width, generator=torch.Generator().manual_seed(n))
    for view in (v for name, v in LAYOUT.views(rows).items() if name.endswith("B")):
        view.mul_(small)
    return rows


def records(n: int, first: int = 0) -> list[dict[str, object]]:
    return [{"id": f"a{i}", "seed": i, "loss": i / 8, "labels": {"hat": i % 2 == 0}} for i in range(first, first + n)]


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("small", [1.0, 1e-7, 1e-30])
def test_every_factor_keeps_its_precision(tmp_path: Path, dtype: str, small: float) -> None:
    """Also B below fp16's smallest number, and beside a factor that is all zeros; the stated error holds."""
    corpus, rows = new(tmp_path / "c", dtype=dtype), drawn(10, small)
    next(iter(LAYOUT.views(rows).values())).zero_()
    corpus.append(rows, records(10))
    read = Corpus.open(tmp_path / "c")
    found = torch.cat(list(read.blocks(3)))
    for name, view in LAYOUT.views(found).items():
        wanted = LAYOUT.views(rows)[name]
        assert float((view - wanted).abs().max()) <= PRECISION[dtype] * float(wanted.abs().max())
        error = (view - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1).clamp(min=1e-38)
        stated = torch.tensor(read.index["error"].to_pylist())
        assert bool((error <= stated * 1.001).all()) and float(stated.max()) <= PRECISION[dtype]


def test_reading_gives_rows_in_any_order_and_block(tmp_path: Path) -> None:
    corpus, rows = new(tmp_path / "c", dtype="float32"), drawn(11)
    corpus.append(rows[:6], records(6))
    corpus.append(rows[6:], records(5, 6))
    read = Corpus.open(tmp_path / "c")
    assert len(read) == 11 and read.width == LAYOUT.width and read.ids == [f"a{i}" for i in range(11)]
    assert [s["rows"] for s in json.loads(read.index.schema.metadata[b"litp.shards"])] == [4, 2, 4, 1]
    for size in (1, 3, 4, 100):
        blocks = list(read.blocks(size))
        assert [len(block) for block in blocks] == [min(size, 11 - i) for i in range(0, 11, size)]
        assert torch.equal(torch.cat(blocks), rows)
    order, out = [10, 0, 7, 7, 3, -1], torch.empty(6, read.width)
    assert torch.equal(read.gather(order), rows[order])
    assert read.gather(order, out).data_ptr() == out.data_ptr() and torch.equal(out, rows[order])
    for first, block in zip((0, 6), read.blocks(6, out), strict=True):
        assert block.data_ptr() == out.data_ptr() and torch.equal(block, rows[first : first + 6])
    assert torch.equal(read.row("a6"), rows[6])
    assert torch.equal(LAYOUT.flatten(read.adapter("a6")), rows[6])
    with pytest.raises(IndexError):
        read.gather([11])
    with pytest.raises(DataError, match="has no adapter 'b'"):
        read.row("b")


def test_a_written_file_does_not_change(tmp_path: Path) -> None:
    """Reading gives copies, and adding leaves shards as they are; the fingerprint is of all rows."""
    corpus = new(tmp_path / "c", dtype="float32")
    corpus.append(drawn(4), records(4))
    path, before = tmp_path / "c" / "shard-00000.safetensors", corpus.fingerprint
    data = path.read_bytes()
    next(iter(corpus.blocks(2))).zero_()
    corpus.row("a0").zero_()
    assert torch.equal(corpus.row("a0"), drawn(4)[0])
    corpus.append(drawn(1), records(1, 4))
    assert path.read_bytes() == data
    assert corpus.fingerprint != before and corpus.fingerprint == Corpus.open(tmp_path / "c").fingerprint
    assert list(load_file(path)) == ["rows"]


def test_labels_are_numbers_and_may_come_later(tmp_path: Path) -> None:
    corpus = new(tmp_path / "c")
    lines = [{"id": "x", "labels": {"hat": True, "age": 3}}, {"id": "y", "labels": {"hat": False, "kind": "owl"}}]
    corpus.append(drawn(2), lines)
    corpus.append(drawn(1), [{"id": "z", "labels": {"age": 1.5, "nose": None}, "prompt": "a critter"}])
    corpus.set_labels({"x": {"age": 4}, "z": {"hat": True, "tail": 1}})
    nan, found = float("nan"), Corpus.open(tmp_path / "c").labels()
    wanted = {"hat": [1, 0, 1], "age": [4, nan, 1.5], "tail": [nan, nan, 1]}
    for name, values in wanted.items():
        torch.testing.assert_close(found[name], torch.tensor(values, dtype=torch.float32), equal_nan=True)
    assert corpus.index["label.kind"].to_pylist() == [None, "owl", None] and "kind" not in found
    assert json.loads(corpus.index["details"].to_pylist()[2]) == {"prompt": "a critter"}


def test_what_is_no_row_is_refused(tmp_path: Path) -> None:
    corpus = new(tmp_path / "c")
    corpus.append(drawn(2), records(2))
    with pytest.raises(DataError, match="'a1' is in the corpus already"):
        corpus.append(drawn(1), records(1, 1))
    with pytest.raises(DataError, match="'x' is in the corpus already"):
        corpus.append(drawn(2), [{"id": "x"}, {"id": "x"}])
    with pytest.raises(DataError, match="'a2' holds NaN or infinite values"):
        corpus.append(torch.full((1, LAYOUT.width), torch.inf), records(1, 2))
    with pytest.raises(DataError, match=f"D = {LAYOUT.width}"):
        corpus.append(torch.zeros(1, 3), records(1, 2))
    assert Corpus.open(tmp_path / "c").ids == ["a0", "a1"]
    with pytest.raises(UsageError, match="holds a corpus already"):
        new(tmp_path / "c")
    with pytest.raises(UsageError, match="'int8' is none"):
        new(tmp_path / "other", dtype="int8")
    with pytest.raises(DataError, match="holds no corpus"):
        Corpus.open(tmp_path)


def test_damage_is_named(tmp_path: Path) -> None:
    corpus = new(tmp_path / "c")
    corpus.append(drawn(20), records(20))
    assert corpus.verify() == []
    paths = [tmp_path / "c" / f"shard-0000{i}.safetensors" for i in range(5)]
    data = paths[0].read_bytes()
    head = 8 + int.from_bytes(data[:8], "little")
    about = json.loads(data[8:head])
    rows, scales = (head + about[name]["data_offsets"][0] for name in ("rows", "scales"))
    flip(paths[0], data.index(b'"1"') + 1)  # the format in the file's metadata
    flip(paths[1], rows + 2 * LAYOUT.width * 2 + 5)  # in the third row
    flip(paths[2], scales + 3)
    os.truncate(paths[3], 1000)
    paths[4].unlink()
    damaged = Corpus.open(tmp_path / "c")
    damage = damaged.verify()
    assert damage[:3] == [
        f"{paths[0]} is damaged, its rows are not",
        f"{paths[1]}: row 2, adapter 'a6', is damaged",
        f"{paths[2]}: all its rows are damaged, 8 to 11 of the corpus",
    ]
    assert damage[3].startswith(f"{paths[3]} is cut short")
    assert damage[4:] == [f"{paths[4]} is missing, with rows 16 to 19"]
    for name, why in (("a6", "'a6', is damaged"), ("a9", "'a9', is damaged"), ("a12", "cut short"), ("a16", "missing")):
        with pytest.raises(DataError, match=why):
            damaged.row(name)
    assert torch.allclose(damaged.row("a5"), corpus.row("a5"))


def test_litp_verify_reads_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new(tmp_path / "c").append(drawn(5), records(5))
    assert main(["verify", str(tmp_path / "c"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"rows": {str(tmp_path / "c"): 5}}
    flip(tmp_path / "c" / "shard-00001.safetensors", -1)
    assert main(["verify", str(tmp_path / "c")]) == 4
    assert "row 0, adapter 'a4', is damaged" in capsys.readouterr().err


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["corpus.json", "index.parquet"])
def test_a_damaged_record_is_named(tmp_path: Path, name: str) -> None:
    corpus = new(tmp_path / "c")
    corpus.append(drawn(12), records(12))
    path = tmp_path / "c" / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=f"{name} is damaged"):
        Corpus.open(tmp_path / "c")


@pytest.mark.parametrize("shift", [-8, 4])
def test_a_header_that_lies(tmp_path: Path, shift: int) -> None:
    """Where the bytes of a tensor are said to be where none are, nothing is read."""
    corpus = new(tmp_path / "c", dtype="float32")
    corpus.append(drawn(1), records(1))
    path = tmp_path / "c" / "shard-00000.safetensors"
    data = path.read_bytes()
    about = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    start, end = about["rows"]["data_offsets"]
    about["rows"]["data_offsets"] = [start + shift, end]
    header = json.dumps(about).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[-(end - start) :])
    with pytest.raises(DataError, match="shard-00000.safetensors is damaged"):
        Corpus.open(tmp_path / "c").gather([0])


@pytest.mark.parametrize("changed", [{"file": "../shard-00000.safetensors"}, {"rows": 2}])
def test_an_index_that_lies(tmp_path: Path, changed: dict[str, object]) -> None:
    """It names shards of its own folder alone, with as many rows as it has lines."""
    corpus = new(tmp_path / "c")
    corpus.append(drawn(1), records(1))
    (shard,) = shards_of(corpus.index)
    told = json.dumps([{**shard, **changed}])
    write_index(tmp_path / "c" / "index.parquet", corpus.index.replace_schema_metadata({"litp.shards": told}))
    with pytest.raises(DataError, match="index.parquet is damaged"):
        Corpus.open(tmp_path / "c")


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    corpus, other = new(tmp_path / "c"), Corpus.open(tmp_path / "c")
    with corpus.writing():
        with pytest.raises(RunLockedError, match=f"process {os.getpid()} on .* adds to the corpus"):
            other.append(drawn(1), records(1))
        corpus.append(drawn(1), records(1))
    other.append(drawn(1), records(1, 1))  # sees what the first one wrote
    assert other.ids == ["a0", "a1"] and Corpus.open(tmp_path / "c").verify() == []


@contextmanager
def ending() -> Iterator[None]:
    """End this process, a fork of pytest's, at the end of the block, however it ends; a fork has no other threads."""
    torch.set_num_threads(1)
    try:
        yield
        os._exit(0)
    finally:
        traceback.print_exc()
        os._exit(1)


def test_a_killed_writer_leaves_every_row_exactly_once(tmp_path: Path) -> None:
    """Killed at random moments and started again, until all rows are there; after each kill the corpus is whole."""
    rows, wanted, chance = drawn(60), [f"a{i}" for i in range(60)], random.Random(0)
    corpus = new(tmp_path / "c", shard_rows=3)
    start = time.perf_counter()
    corpus.append(rows[:3], records(3))
    duration, kills = time.perf_counter() - start, 0
    while True:
        seen = len(corpus)
        heard, said = os.pipe()
        child = os.fork()
        if child == 0:
            with ending():
                corpus = Corpus.open(tmp_path / "c")
                for n in range(len(corpus), 60, 3):
                    os.write(said, b"1")
                    corpus.append(rows[n : n + 3], records(3, n))
        os.close(said)
        for _ in range(chance.randint(1, 3)):
            os.read(heard, 1)  # nothing at its end
        time.sleep(chance.uniform(0, 1.5 * duration))
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.close(heard)
        corpus = Corpus.open(tmp_path / "c")
        assert corpus.verify() == [] and len(corpus) >= seen and corpus.ids == wanted[: len(corpus)]
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
        assert kills < 100
    assert kills >= 5
    assert corpus.ids == wanted
    assert torch.allclose(corpus.gather(range(60)), rows, rtol=1e-3, atol=1e-3)
    with corpus.writing():
        pass
    left = {path.name for path in (tmp_path / "c").iterdir()}
    assert left == {"corpus.json", "index.parquet", ".lock", *(f"shard-{i:05d}.safetensors" for i in range(20))}


@pytest.mark.parametrize("moment", range(8))
def test_killed_at_each_step_of_a_write(tmp_path: Path, moment: int) -> None:
    """At the n-th flush or rename: the rows are there, or they are not, and the next writer adds them."""
    corpus = new(tmp_path / "c")
    corpus.append(drawn(4), records(4))
    child = os.fork()
    if child == 0:
        calls = 0

        def dying(original):  # noqa: ANN001, ANN202
            def call(*arguments: object) -> object:
                nonlocal calls
                if calls == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls += 1
                return original(*arguments)

            return call

        with ending():
            os.fsync, os.replace = dying(os.fsync), dying(os.replace)
            corpus.append(drawn(4), records(4, 4))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (0 if moment >= 6 else -signal.SIGKILL)  # flush, rename and flush of shard, then of index
    found = Corpus.open(tmp_path / "c")
    assert found.verify() == [] and len(found) == (8 if moment >= 5 else 4)
    if len(found) == 4:
        found.append(drawn(4), records(4, 4))
    assert torch.allclose(found.gather(range(4, 8)), drawn(4), rtol=1e-3, atol=1e-3)
