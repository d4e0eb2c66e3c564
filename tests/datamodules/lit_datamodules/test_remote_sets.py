"""Training from regularization shards elsewhere is training from local ones; what cannot be fetched is counted."""

from __future__ import annotations

import json
import logging
import multiprocessing
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_datamodules import shard_access
from lit_datamodules.concept_folder import Concept
from lit_datamodules.errors import DataError, DataOptionError
from lit_datamodules.personalization import PersonalizationData
from lit_datamodules.regularization import Regularization
from lit_datamodules.shard_sets import read_shards
from lit_datamodules.stored_picture import StoredPicture

Make = Callable[..., PersonalizationData]
BRACES = "{00000..00002}.tar"


@pytest.fixture(autouse=True)
def quick(hasty: None) -> None:
    pass


@pytest.fixture
def make(base: Any, folder: Callable[..., Path], shards: Callable[..., Path], tmp_path: Path) -> Make:
    """A data module over five photos and twelve regularization pictures in three shards of `tmp_path / shards`."""
    photos = folder()
    shards(12)

    def build(pattern: str, stream: bool = True, fetch: bool = True, **options: Any) -> PersonalizationData:
        fetch_to = str(tmp_path / "fetched") if fetch else None
        sets = Regularization(shards=pattern, stream=stream, per_batch=2, fetch_to=fetch_to)
        data = PersonalizationData([Concept(str(photos), "cat", "<new1>")], 32, sets, cache_latents=False, **options)
        data.bind(base, base)
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            global_rank=0, world_size=1, max_steps=20, accumulate_grad_batches=1
        )
        data.prepare_data()
        data.setup("fit")
        return data

    return build


def sources(web: Any, tmp_path: Path) -> dict[str, str]:
    return {
        "local": f"{tmp_path}/shards/{BRACES}", "http": f"{web.url}/shards/{BRACES}",
        "pipe": f"pipe:cat {tmp_path}/shards/{BRACES}", "file": f"file://{tmp_path}/shards/{BRACES}",
    }  # fmt: skip


@pytest.mark.parametrize("stream", [True, False])
def test_batches_are_those_of_local_shards(make: Make, web: Any, tmp_path: Path, stream: bool) -> None:
    web.trouble["00001.tar"] = ["503", "cut"]
    patterns = sources(web, tmp_path)
    local = make(patterns["local"], stream, fetch=False)
    for kind in ("http", "pipe", "file"):
        away = make(patterns[kind], stream, num_workers=2 * (kind == "http"))
        assert all(isinstance(s.picture, StoredPicture) == stream for s in away.samples if s.role)
        for ours, theirs in zip(islice(away.train_dataloader(), 7), local.train_dataloader(), strict=False):
            assert ours["captions"] == theirs["captions"] and torch.equal(ours["pixels"], theirs["pixels"])
        away.teardown()
        named = [s.name for s in away.samples if s.role]
        assert named[0] == f"{patterns[kind].replace(BRACES, '00000.tar')}:000000000", "as it was written"
        assert [r.path for r in away.records if r.fate != "used"] == []
    assert [web.got(f"0000{i}.tar") for i in range(3)] == [1, 3, 1]


def test_what_was_fetched_is_kept_and_told(
    make: Make, web: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    data = make(sources(web, tmp_path)["http"])
    size = sum(path.stat().st_size for path in (tmp_path / "shards").glob("*.tar"))
    assert f"not here yet: 3 ({size / 1000:.3g} kB) into {tmp_path}/fetched, where they are kept" in caplog.text
    state = data.state_dict()
    web.asked.clear()
    again = make(sources(web, tmp_path)["http"])
    assert not web.asked, "nothing is asked for what is here"
    again.load_state_dict(state)


def test_a_cursor_does_not_know_where_shards_were_fetched_to(make: Make, web: Any, tmp_path: Path) -> None:
    first = make(sources(web, tmp_path)["http"])
    begun = [b["sample_id"] for b in islice(first.train_dataloader(), 4)]
    state = json.loads(json.dumps(first.state_dict()))
    assert "fetched" not in json.dumps(state)
    (tmp_path / "fetched").rename(tmp_path / "before")
    second = make(sources(web, tmp_path)["http"])
    second.load_state_dict(state)
    rest = [b["sample_id"] for b in second.train_dataloader()]
    whole = [b["sample_id"] for b in make(sources(web, tmp_path)["http"]).train_dataloader()]
    assert begun + rest == whole


def test_a_shard_that_cannot_be_fetched_is_an_unreadable_one(make: Make, web: Any, tmp_path: Path) -> None:
    web.trouble["00001.tar"] = ["503"] * 10  # of two that try: before training, and when the set is read
    pattern = sources(web, tmp_path)["http"]
    said = rf"cannot fetch {web.url}/shards/00001\.tar: the server answers 503 Service Unavailable \(5 attempts\)"
    with pytest.raises(DataError, match=said):
        make(pattern)
    web.trouble["00001.tar"] = ["503"] * 10
    tolerant = make(pattern, strict=False, max_skipped=1)
    [skipped] = [r for r in tolerant.records if r.fate == "skipped"]
    assert skipped.path == f"{web.url}/shards/00001.tar" and "503" in skipped.reason
    assert sum(s.role for s in tolerant.samples) == 7
    assert sum(s.role for s in make(pattern).samples) == 12, "fetched when the server is well again"


def test_a_web_page_in_place_of_a_shard(make: Make, web: Any, tmp_path: Path) -> None:
    (tmp_path / "shards/00001.tar").write_bytes(b"<html>please log in</html>" * 99)
    (tmp_path / "shards/shards.json").unlink(missing_ok=True)
    with pytest.raises(DataError, match=rf"shard {web.url}/shards/00001\.tar, fetched to .* is a web page") as stop:
        make(sources(web, tmp_path)["http"])
    assert "remove that copy to fetch it again" in str(stop.value)


def test_more_than_there_is_room_for(make: Make, web: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_access.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(DataError, match=r"fetched has room for 10 kB, the shards have .* kB; name another"):
        make(sources(web, tmp_path)["http"])
    assert not any(web.got(f"0000{i}.tar") for i in range(3))


def test_wrong_options() -> None:
    with pytest.raises(DataOptionError, match=r"https://host/0\.tar lies elsewhere .* regularization\.fetch_to"):
        Regularization(shards="https://host/0.tar")
    with pytest.raises(DataOptionError, match="fetch_to is where shards are fetched to; this set has none"):
        Regularization(folder="reg", fetch_to="here")


def _rank(rank: int, pattern: str, folder: str, found: Any) -> None:
    import torch.distributed as dist

    from lit_datamodules import fetching

    fetching.FIRST_WAIT = 0.001
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    contents = read_shards(0, pattern, 64, True, Path(folder) / f"node{rank}")
    found.put((rank, [s.name for s in contents.samples], [r.path for r in contents.records if r.fate == "skipped"]))
    dist.destroy_process_group()


def test_ranks_agree_on_what_could_not_be_fetched(
    web: Any, shards: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second node has the shard from before; the first cannot get it."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    shards(12)
    pattern = sources(web, tmp_path)["http"]
    read_shards(0, pattern, 64, True, tmp_path / "node1")
    web.trouble["00001.tar"] = ["503"] * 5
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    asked = [(rank, pattern, str(tmp_path), found) for rank in (0, 1)]
    processes = [context.Process(target=_rank, args=arguments, daemon=True) for arguments in asked]
    for process in processes:
        process.start()
    (_, names, skipped), (_, others, same) = sorted(found.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    assert names == others and len(names) == 7
    assert skipped == same == [f"{web.url}/shards/00001.tar"]
