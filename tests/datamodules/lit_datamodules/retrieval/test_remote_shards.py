"""Shards elsewhere give what local ones give, byte for byte, and little of them lies on the disk at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from lit_datamodules.errors import DataError, DataOptionError, FetchError
from lit_datamodules.retrieval import retrieve, vector_index
from lit_datamodules.retrieval.merge import Selection
from lit_datamodules.retrieval.plan import Plan, Query
from lit_datamodules.retrieval.retrieve import find_shards, part_path, parts_folder
from lit_datamodules.shard_writer import MANIFEST
from lit_personalize.tinyworld.dataset import sample_pictures, write_shards

QUERIES = (Query("circle", text="a photo of a red circle"), Query("critter", text="a critter with wings"))
SET = ("00000.tar", "shards.json", "retrieval.json")
Run = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def quick(hasty: None) -> None:
    pass


@pytest.fixture(scope="module")
def encoder() -> Any:
    from lit_personalize.metrics.caption_encoder import CaptionEncoder
    from lit_personalize.tinyworld.build import committed_weights

    return CaptionEncoder(committed_weights() / "clip")


@pytest.fixture
def laion(tmp_path: Path) -> Path:
    """Forty rendered pictures in four shards, without notes beside them."""
    write_shards(sample_pictures(40, 6), tmp_path / "laion", per_shard=10)
    (tmp_path / "laion" / MANIFEST).unlink(missing_ok=True)
    return tmp_path / "laion"


@pytest.fixture
def run(encoder: Any, tmp_path: Path) -> Run:
    plan = Plan(QUERIES, encoder.fingerprint, keep=20, batch_size=8)
    queries = np.concatenate([encoder.texts([query.text]) for query in QUERIES])

    def work(pattern: str, name: str, keep: bool = False, tasks: int = 1, merge: bool = True) -> dict[str, Any]:
        shards = find_shards([pattern], tmp_path / "fetched")
        for number in range(tasks):
            retrieve.scan(shards, plan, encoder, queries, tmp_path / name, (number, tasks), keep)
        selection = Selection(n=6, near_duplicates=0)
        return retrieve.merge_parts(shards, plan, selection, tmp_path / name) if merge else {}

    work.plan, work.queries = plan, queries  # type: ignore[attr-defined]
    return work


def same(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in SET)


def elsewhere(laion: Path, web: Any, kind: str) -> str:
    braces = "{00000..00003}.tar"
    if kind == "memory":
        for path in laion.glob("*.tar"):
            fsspec.filesystem("memory").pipe(f"/laion/{path.name}", path.read_bytes())
    return {
        "http": f"{web.url}/laion/{braces}", "memory": f"memory://laion/{braces}",
        "file": f"file://{laion}/{braces}", "pipe": f"pipe:cat {laion}/{braces}",
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["http", "memory", "file"])
def test_the_set_is_that_of_local_shards(run: Run, laion: Path, web: Any, tmp_path: Path, kind: str) -> None:
    web.trouble["00001.tar"] = ["503", "503"]
    web.trouble["00002.tar"] = ["cut"]
    local = run(str(laion / "*.tar"), "local")
    assert run(elsewhere(laion, web, kind), "away", tasks=2) == local
    assert same(tmp_path / "local", tmp_path / "away")
    assert list((tmp_path / "fetched").iterdir()) == [], "what was scanned is removed"
    if kind == "http":
        assert [web.got(f"0000{i}.tar") for i in range(4)] == [1, 3, 2, 1], "fetched whole to be scanned, and only then"
        assert any(span for _, _, span in web.asked), "pictures are read alone"


def test_servers_that_give_no_parts_are_asked_once_more(run: Run, laion: Path, web: Any, tmp_path: Path) -> None:
    run(str(laion / "*.tar"), "local")
    web.parts = False
    run(elsewhere(laion, web, "http"), "away")
    assert same(tmp_path / "local", tmp_path / "away")
    assert all(web.got(f"0000{i}.tar") <= 2 for i in range(4)) and not list((tmp_path / "fetched").iterdir())
    assert sum(bool(span) for _, _, span in web.asked) == 1, "once is enough to know"


def test_pipes_are_known_by_their_commands(run: Run, laion: Path, web: Any, tmp_path: Path) -> None:
    pattern = elsewhere(laion, web, "pipe")
    local, piped = run(str(laion / "*.tar"), "local"), run(pattern, "piped")
    assert piped["queries"] == local["queries"] and piped["scanned"] == local["scanned"]
    assert not list((tmp_path / "fetched").iterdir())
    long = f"pipe:cat {laion}/{{00000..00003}}.tar # {'so that it cannot be the name of a file ' * 9}"
    assert run(long, "long")["queries"] == local["queries"]


def test_few_shards_lie_here_at_once(
    run: Run, laion: Path, web: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    write = retrieve.write_part

    def count(*arguments: Any) -> None:
        seen.append(len(list((tmp_path / "fetched").rglob("*.tar"))))
        write(*arguments)

    monkeypatch.setattr(retrieve, "write_part", count)
    run(elsewhere(laion, web, "http"), "away", merge=False)
    assert len(seen) == 4 and max(seen) <= 2


def test_what_is_kept_is_not_fetched_again_unless_it_changed(run: Run, laion: Path, web: Any, tmp_path: Path) -> None:
    pattern = elsewhere(laion, web, "http")
    run(pattern, "first", keep=True)
    assert len(list((tmp_path / "fetched").rglob("*.tar"))) == 4
    run(pattern, "second")
    assert [web.got(f"0000{i}.tar") for i in range(4)] == [1, 1, 1, 1] and same(tmp_path / "first", tmp_path / "second")
    write_shards(sample_pictures(10, 99), tmp_path / "other", per_shard=10)
    shutil.copy(tmp_path / "other/00000.tar", laion / "00002.tar")
    run(str(laion / "*.tar"), "local")
    run(pattern, "second", keep=True)
    assert same(tmp_path / "local", tmp_path / "second") and web.got("00002.tar") == 2


def test_a_dead_shard_stops_and_what_was_done_counts(run: Run, laion: Path, web: Any, tmp_path: Path) -> None:
    web.trouble["00002.tar"] = ["503"] * 5
    with pytest.raises(FetchError, match=rf"cannot fetch {web.url}/laion/00002\.tar: .*503.* \(5 attempts\)"):
        run(elsewhere(laion, web, "http"), "away")
    assert list((tmp_path / "fetched").iterdir()) == []
    run(elsewhere(laion, web, "http"), "away")
    assert web.got("00000.tar") == web.got("00001.tar") == 1, "scanned before"


@pytest.mark.parametrize("kind", ["local", "http"])
def test_a_part_of_another_shard_of_its_name_and_size_is_replaced(
    run: Run, laion: Path, web: Any, tmp_path: Path, kind: str
) -> None:
    """As when another set is searched into the same folder, or a shard was packed again."""
    other = tmp_path / "other"
    write_shards(sample_pictures(40, 77), other, per_shard=10)
    room = max(path.stat().st_size for folder in (laion, other) for path in folder.glob("*.tar"))
    for path in [*laion.glob("*.tar"), *other.glob("*.tar")]:
        path.write_bytes(path.read_bytes().ljust(room, b"\0"))
    first, second = (elsewhere(laion, web, kind), f"{web.url}/other/{{00000..00003}}.tar") if kind == "http" else (
        str(laion / "*.tar"), str(other / "*.tar"))  # fmt: skip
    run(first, "out")
    part = part_path(parts_folder(tmp_path / "out", run.plan), "00001.tar")  # type: ignore[attr-defined]
    before = part.read_bytes()
    run(second, "out")
    run(second, "fresh")
    assert same(tmp_path / "out", tmp_path / "fresh") and part.read_bytes() != before
    shutil.copy(laion / "00001.tar", other / "00001.tar")
    shards = find_shards([second], tmp_path / "fetched")
    with pytest.raises(DataError, match=r"00001\.tar changed since it was scanned; scan it again, then merge"):
        retrieve.merge_parts(shards, run.plan, Selection(n=6), tmp_path / "out")  # type: ignore[attr-defined]
    inode = {p.name: p.stat().st_ino for p in part.parent.glob("*.parquet")}
    run(second, "out")
    assert {p.name for p in part.parent.glob("*.parquet") if p.stat().st_ino != inode[p.name]} == {"00001.tar.parquet"}


def test_a_copy_of_a_set_is_the_same_set(run: Run, laion: Path, tmp_path: Path) -> None:
    run(str(laion / "*.tar"), "out")
    folder = parts_folder(tmp_path / "out", run.plan)  # type: ignore[attr-defined]
    before = {path: path.stat().st_ino for path in folder.iterdir()}
    (tmp_path / "moved").mkdir()
    for path in laion.glob("*.tar"):
        shutil.copyfile(path, tmp_path / "moved" / path.name)
    run(str(tmp_path / "moved/*.tar"), "out")
    assert {path: path.stat().st_ino for path in folder.iterdir()} == before


def test_notes_beside_shards_are_held_against_them(run: Run, laion: Path, web: Any, tmp_path: Path) -> None:
    from lit_datamodules.shard_writer import sha256_of_file, write_json

    said = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of_file(p)} for p in laion.glob("*.tar")}
    write_json(said, laion / MANIFEST)
    run(elsewhere(laion, web, "http"), "fine")
    data = bytearray((laion / "00001.tar").read_bytes())
    data[5000] ^= 1
    (laion / "00001.tar").write_bytes(data)
    with pytest.raises(FetchError, match=r"00001\.tar: what came is damaged: its sha256 .* \(5 attempts\)"):
        run(elsewhere(laion, web, "http"), "damaged")


def test_an_index_of_shards_elsewhere(run: Run, encoder: Any, laion: Path, web: Any, tmp_path: Path) -> None:
    found = {}
    selection = Selection(n=6, near_duplicates=0)
    for name, pattern in (("local", str(laion / "*.tar")), ("away", elsewhere(laion, web, "http"))):
        shards, folder = find_shards([pattern], tmp_path / "fetched"), tmp_path / f"index-{name}"
        assert vector_index.embed_shards(shards, encoder, folder, 8) == 4
        vector_index.build(shards, folder)
        asked = (folder, shards, run.plan, run.queries, selection, tmp_path / name, 1.0)  # type: ignore[attr-defined]
        found[name] = retrieve.merge_index(*asked)
    assert found["local"] == found["away"] and same(tmp_path / "local", tmp_path / "away")
    assert not list((tmp_path / "fetched").iterdir())
    shutil.copy(laion / "00000.tar", laion / "00003.tar")
    with pytest.raises(DataError, match=r"00003\.tar changed since it was scanned"):
        retrieve.merge_index(*asked)
    assert vector_index.embed_shards(shards, encoder, folder, 8) == 1
    with pytest.raises(DataError, match="holds no finished index"):
        retrieve.merge_index(*asked)
    vector_index.build(shards, folder)
    assert retrieve.merge_index(*asked)["pictures"] > 0


def test_names_are_what_is_not_common_to_all(laion: Path, tmp_path: Path) -> None:
    both = find_shards(["memory://b/x/{0..1}.tar", "memory://b/y/0.tar"], tmp_path)
    assert list(both) == ["x/0.tar", "x/1.tar", "y/0.tar"]
    mixed = find_shards([str(laion / "00000.tar"), "memory://b/0.tar", "pipe:cat a b/{0..1}.tar"], tmp_path)
    assert sorted(mixed) == [str(laion / "00000.tar"), "memory://b/0.tar", "pipe:cat a b/0.tar", "pipe:cat a b/1.tar"]
    assert list(find_shards(["memory://b/x/{0..1}.tar"], tmp_path)) == ["0.tar", "1.tar"]


@pytest.mark.parametrize(
    ("pattern", "folder", "said"),
    [
        (
            "https://host/0.tar",
            False,
            "lies elsewhere and is fetched only when asked: name a folder for that by --fetch-to",
        ),
        ("nope://host/0.tar", True, "fsspec knows no nope://"),
        ("memory://host/*.tar", True, "names no file; write URLs with a range"),
        ("memory://host/", True, "names no file"),
        ("laion/{0..3.tar", False, "write a range as"),
    ],
)
def test_what_cannot_be_fetched_is_said_first(pattern: str, folder: bool, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataOptionError, match=said):
        find_shards([pattern], tmp_path if folder else None)
