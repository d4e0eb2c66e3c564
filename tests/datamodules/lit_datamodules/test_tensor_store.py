"""A store keeps what is put into it, for any number of processes; damage is named."""

from __future__ import annotations

import multiprocessing
import pickle
import resource
from pathlib import Path

import pytest
import torch

from lit_datamodules.errors import DataError
from lit_datamodules.tensor_store import TensorStore, key_of


def entry(number: int) -> dict[str, torch.Tensor]:
    return {"mean": torch.full((2, 3), float(number)), "std": torch.full((4,), number, dtype=torch.bfloat16)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_entries_come_back(tmp_path: Path) -> None:
    store = TensorStore(tmp_path / "store")
    assert len(store) == 0 and "a" not in store and not (tmp_path / "store").exists()
    store.put({"a": entry(1), "b": entry(2)})
    store.put({"b": entry(9), "c": entry(3)})
    for found in (store, TensorStore(tmp_path / "store"), pickle.loads(pickle.dumps(store))):
        assert len(found) == 3 and all(same(found.get(key), entry(n)) for key, n in (("a", 1), ("b", 2), ("c", 3)))
    with pytest.raises(KeyError):
        store.get("d")


def test_another_process_is_seen_after_a_refresh(tmp_path: Path) -> None:
    one, two = TensorStore(tmp_path), TensorStore(tmp_path)
    one.put({"a": entry(1)})
    assert "a" not in two
    two.refresh()
    assert same(two.get("a"), entry(1))


def _fill(folder: Path, first: int) -> None:
    store = TensorStore(folder)
    for start in range(first, 40, 4):
        store.put({str(n): entry(n) for n in range(start, min(start + 4, 40))})


def test_processes_fill_one_store_at_once(tmp_path: Path) -> None:
    """Their shares overlap: each begins elsewhere, and all go to the end."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_fill, args=(tmp_path, first)) for first in (0, 2, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    store = TensorStore(tmp_path)
    assert len(store) == 40 and all(same(store.get(str(n)), entry(n)) for n in range(40))
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_damaged_file_is_named(tmp_path: Path, keep: int) -> None:
    store = TensorStore(tmp_path)
    store.put({"a": entry(1)})
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=f"cache file {path} is damaged .* remove it"):
        TensorStore(tmp_path)


def test_a_full_disk_names_the_file_and_leaves_the_rest(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    store.put({"a": entry(1)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError) as stop:
            store.put({"big": {"x": torch.zeros(10_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert Path(stop.value.filename).parent == tmp_path
    assert len(list(tmp_path.iterdir())) == 1 and same(TensorStore(tmp_path).get("a"), entry(1))


def test_keys_tell_their_parts_apart() -> None:
    keys = {key_of("a", 1), key_of("a", "1"), key_of("a", 1, None), key_of(["a", 1]), key_of("b", 1)}
    assert len(keys) == 5 and key_of({"x": 1, "y": 2}) == key_of({"y": 2, "x": 1})
