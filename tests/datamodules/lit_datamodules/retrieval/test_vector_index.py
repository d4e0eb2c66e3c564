"""An index gives what a scan gives where it looks at everything, and nearly that where it does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_datamodules.errors import DataError, DataOptionError
from lit_datamodules.retrieval import vector_index
from lit_datamodules.retrieval.merge import Selection
from lit_datamodules.retrieval.plan import Filters, Plan, Query
from lit_datamodules.retrieval.retrieve import find_shards, merge_index, merge_parts, scan
from lit_datamodules.tar_index import index_tar, read_member

ALL = Selection(n=6, near_duplicates=0)
QUERIES = (Query("circle", text="a photo of a red circle"), Query("critter", text="a critter with wings"))


@pytest.fixture(scope="module")
def encoder() -> Any:
    from lit_personalize.metrics.caption_encoder import CaptionEncoder
    from lit_personalize.tinyworld.build import committed_weights

    return CaptionEncoder(committed_weights() / "clip")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Five hundred rendered pictures in five shards."""
    from lit_personalize.tinyworld.dataset import sample_pictures, write_shards

    folder = tmp_path_factory.mktemp("corpus")
    write_shards(sample_pictures(500, 4), folder, per_shard=100)
    return find_shards([str(folder / "*.tar")])


@pytest.fixture(scope="module")
def index(encoder: Any, shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    assert vector_index.embed_shards(shards, encoder, folder, 64, (1, 2)) == 2
    with pytest.raises(DataError, match=r"3 of 5 shards are not embedded yet: 00000\.tar"):
        vector_index.build(shards, folder)
    assert vector_index.embed_shards(shards, encoder, folder, 64) == 3
    report = vector_index.build(shards, folder)
    assert report["vectors"] == 500 and list(report["shards"].values()) == [100] * 5
    return folder


def plan_of(encoder: Any, **options: Any) -> Plan:
    return Plan(**{"queries": QUERIES, "encoder": encoder.fingerprint, "keep": 50, "batch_size": 64, **options})


def vectors(encoder: Any) -> np.ndarray:
    return np.concatenate([encoder.texts([query.text]) for query in QUERIES])


def sources(out: Path) -> list[tuple[str, str, tuple[str, ...]]]:
    found = []
    for entry in index_tar(out / "00000.tar").entries:
        about = json.loads(read_member(out / "00000.tar", entry.members["json"]))
        found.append((about["source"]["shard"], about["source"]["key"], tuple(about["concepts"])))
    return found


def test_looking_at_all_lists_is_a_scan(encoder: Any, shards: dict[str, Path], index: Path, tmp_path: Path) -> None:
    """Up to the half precision in which vectors are kept."""
    plan = plan_of(encoder)
    scan(shards, plan, encoder, vectors(encoder), tmp_path / "scan")
    scanned = merge_parts(shards, plan, ALL, tmp_path / "scan")
    searched = merge_index(index, shards, plan, vectors(encoder), ALL, tmp_path / "index", 1.0)
    assert sources(tmp_path / "scan") == sources(tmp_path / "index")
    for name in ("circle", "critter"):
        ours, theirs = (report["queries"][name]["similarity"] for report in (searched, scanned))
        assert ours["mean"] == pytest.approx(theirs["mean"], abs=1e-3)
        assert searched["queries"][name]["kept"] == 6


def test_a_few_lists_find_most(encoder: Any, shards: dict[str, Path], index: Path, tmp_path: Path) -> None:
    plan = plan_of(encoder)
    merge_index(index, shards, plan, vectors(encoder), ALL, tmp_path / "all", 1.0)
    report = merge_index(index, shards, plan, vectors(encoder), ALL, tmp_path / "few", 0.3)
    whole, few = set(sources(tmp_path / "all")), set(sources(tmp_path / "few"))
    assert report["pictures"] == 12 and len(whole & few) >= 8


def test_filters_and_thresholds_hold_for_an_index(
    encoder: Any, shards: dict[str, Path], index: Path, tmp_path: Path
) -> None:
    plan = plan_of(encoder, filters=Filters(max_punsafe=0.5))
    with pytest.raises(DataError, match="no picture passes"):
        merge_index(index, shards, plan, vectors(encoder), ALL, tmp_path)
    close = Selection(n=6, min_similarity=0.75, near_duplicates=0)
    report = merge_index(index, shards, plan_of(encoder), vectors(encoder), close, tmp_path, 1.0)
    assert all(told["similarity"]["min"] >= 0.75 for told in report["queries"].values() if told["kept"])
    with pytest.raises(DataOptionError, match="a percentile needs all similarities"):
        merge_index(index, shards, plan_of(encoder), vectors(encoder), Selection(percentile=9), tmp_path)


def test_what_does_not_belong_together_is_refused(
    encoder: Any, shards: dict[str, Path], index: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="and not by another"):
        merge_index(index, shards, replace(plan_of(encoder), encoder="another"), vectors(encoder), ALL, tmp_path)
    with pytest.raises(DataError, match="holds no finished index"):
        merge_index(tmp_path, shards, plan_of(encoder), vectors(encoder), ALL, tmp_path)
    with pytest.raises(DataError, match=r"shards that are not given: 0000\d\.tar"):
        first = dict(list(shards.items())[:1])
        merge_index(index, first, plan_of(encoder), vectors(encoder), ALL, tmp_path)
    with pytest.raises(DataError, match="another encoder or batch size"):
        vector_index.embed_shards(shards, encoder, index, 65)
