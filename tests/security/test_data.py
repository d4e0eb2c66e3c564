"""Pictures, shards and indices of strangers: nothing is unpacked, nothing outside is read, nothing is unpickled."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import hostile
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from lit_datamodules.errors import DataError
from lit_datamodules.image_files import decode_image, size_of
from lit_datamodules.retrieval import vector_index
from lit_datamodules.retrieval.parts import PICTURE, Part, fields_of, write_table
from lit_datamodules.retrieval.plan import Plan, Query
from lit_datamodules.shard_sets import read_shards
from lit_datamodules.shard_writer import difference
from lit_datamodules.tar_index import Member, index_tar, read_member

MEMBERS = {
    "a path upwards": ("../escaped", hostile.picture(), tarfile.REGTYPE, "names a file outside of it, ../escaped.png"),
    "a path upwards within": ("a/../../escaped", hostile.picture(), tarfile.REGTYPE, "names a file outside of it"),
    "an absolute path": ("/escaped", hostile.picture(), tarfile.REGTYPE, "names a file outside of it, /escaped.png"),
    "a symbolic link": ("link", "/etc/passwd", tarfile.SYMTYPE, "holds a symbolic link, link.png"),
    "a hard link": ("link", "good.png", tarfile.LNKTYPE, "holds a hard link, link.png"),
    "a device": ("device", b"", tarfile.CHRTYPE, "holds a device, device.png"),
    "a disk": ("device", b"", tarfile.BLKTYPE, "holds a device, device.png"),
    "a pipe": ("pipe", b"", tarfile.FIFOTYPE, "holds a pipe, pipe.png"),
}


@pytest.mark.parametrize("wrong", MEMBERS)
def test_a_hostile_member_of_a_shard(wrong: str) -> None:
    """It is left out with a line that names it, and the samples beside it are used."""
    name, content, kind, message = MEMBERS[wrong]
    good = [("good.png", hostile.picture(), tarfile.REGTYPE), ("good.txt", b"a cat", tarfile.REGTYPE)]
    Path("shard.tar").write_bytes(hostile.tar([*good, (f"{name}.png", content, kind), (f"{name}.txt", b"x", kind)]))
    index = index_tar(Path("shard.tar"))
    assert [entry.key for entry in index.entries] == ["good"]
    assert any(message in fault.reason for fault in index.faults)
    contents = read_shards(0, "shard.tar", 8)
    assert [sample.captions for sample in contents.samples] == [("a cat",)]
    (record,) = [record for record in contents.records if record.fate == "skipped"]
    assert "shard.tar" in record.reason and message in record.reason and "pack it again" in record.reason
    assert sorted(path.name for path in Path().iterdir()) == ["shard.tar"]


def test_a_decompression_bomb() -> None:
    """Sixty thousand pixels a side in a few hundred bytes."""
    bomb = hostile.picture(60_000, 60_000)
    assert len(bomb) < 100_000
    for read in (decode_image, size_of):
        with pytest.raises(DataError, match=r"cannot read picture bomb\.png: .*decompression bomb"):
            read(bomb, "bomb.png")


def test_a_format_that_needs_a_program_is_no_picture() -> None:
    with pytest.raises(DataError, match="is no jpg, png or webp picture"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(RAN) (w) file\n", "photo.png")


def test_json_that_is_nested_without_end() -> None:
    assert fields_of("[" * 200_000) is None
    Path("shards.json").write_text("[" * 200_000)
    Path("shard.tar").write_bytes(hostile.tar([("a.txt", b"a", tarfile.REGTYPE)]))
    with pytest.raises(DataError, match=r"shards\.json is damaged"):
        difference(Path("shard.tar"))


def test_a_place_that_no_shard_has() -> None:
    """Which a foreign index may name."""
    Path("shard.tar").write_bytes(bytes(1024))
    for offset, size in ((0, 1 << 60), (-8, 8), (8, -1), (1 << 60, 1)):
        assert read_member(Path("shard.tar"), Member(offset, size)) == b""


@pytest.fixture
def index(workplace: Path) -> tuple[Path, Plan]:
    """An index of one shard of four captions, made by our own code."""
    pytest.importorskip("faiss")
    folder, rng = workplace / "index", np.random.default_rng(0)
    vectors = rng.standard_normal((80, 8)).astype(np.float16)
    rows = [{"key": str(i), "kind": "png", "offset": 0, "bytes": 1, "caption": "", "meta": ""} for i in range(80)]
    (folder / "embeddings").mkdir(parents=True)
    np.save(folder / "embeddings/0.tar.npy", vectors)
    write_table(rows, PICTURE, Part("0.tar", "v"), folder / "rows/0.tar.parquet")
    (folder / "encoder.json").write_text(json.dumps({"encoder": "e", "batch_size": 1}))
    vector_index.build({"0.tar": Path("0.tar")}, folder)
    return folder, Plan((Query("q", text="a"),), "e")


def search(index: tuple[Path, Plan]) -> list[Part]:
    return list(vector_index.search(*index, np.ones((1, 8), np.float32), 1.0))


def test_a_pickle_in_an_index(index: tuple[Path, Plan]) -> None:
    assert search(index)[0].candidates
    (index[0] / "embeddings/0.tar.npy").write_bytes(hostile.object_array())
    with pytest.raises(DataError, match=r"0\.tar\.npy holds no embeddings .* run `litp data index` again"):
        search(index)


@pytest.mark.parametrize(("file", "content"), [
    ("vectors.faiss", hostile.bare_pickle()),
    ("index.json", b"[" * 200_000),
    ("index.json", b'{"encoder": "e", "vectors": -1, "width": 8, "lists": 1, "shards": {}}'),
    ("rows/0.tar.parquet", hostile.bare_pickle()),
])  # fmt: skip
def test_a_damaged_index(index: tuple[Path, Plan], file: str, content: bytes) -> None:
    (index[0] / file).write_bytes(content)
    with pytest.raises(DataError, match=Path(file).name.replace(".", r"\.")):
        search(index)


def test_rows_of_another_index(index: tuple[Path, Plan]) -> None:
    few = [dict.fromkeys((name for name, _ in PICTURE))]
    write_table(few, PICTURE, Part("0.tar", "v"), index[0] / "rows/0.tar.parquet")
    with pytest.raises(DataError, match=r"0\.tar\.parquet is not that of its embeddings"):
        search(index)


def test_a_parquet_file_whose_schema_is_a_pickle(index: tuple[Path, Plan]) -> None:
    """pyarrow once unpickled extension types of Python on its own."""
    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type",
                b"ARROW:extension:metadata": hostile.bare_pickle()}  # fmt: skip
    fields = [pa.field(name, kind, metadata=metadata if name == "key" else None) for name, kind in PICTURE]
    path = index[0] / "rows/0.tar.parquet"
    table = pa.parquet.read_table(path)
    pa.parquet.write_table(table.cast(pa.schema(fields, table.schema.metadata)), path)
    assert search(index)[0].candidates
