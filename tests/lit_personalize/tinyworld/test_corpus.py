"""A corpus is a function of its seed: however it was stopped, and by however many processes it was rendered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lit_personalize.errors import DataError
from lit_personalize.tinyworld.corpus import write_corpus
from lit_personalize.tinyworld.dataset import read_tar


def quiet(_: str) -> None:
    """Progress is not looked at here."""


def test_a_stopped_corpus_goes_on_and_processes_do_not_matter(tmp_path: Path) -> None:
    whole = write_corpus(tmp_path / "whole", 8, 3, processes=2, log=quiet)
    assert [path.name for path in whole] == ["00000.tar", "00001.tar", "00002.tar"]
    again = write_corpus(tmp_path / "cut", 8, 3, log=quiet)
    again[1].unlink()
    kept = again[0].stat().st_mtime_ns
    told: list[str] = []
    write_corpus(tmp_path / "cut", 8, 3, log=told.append)
    assert told == ["00001.tar (1 of 1)"] and again[0].stat().st_mtime_ns == kept
    assert [path.read_bytes() for path in whole] == [path.read_bytes() for path in again]


def test_samples_hold_what_is_shown_and_what_is_said(tmp_path: Path) -> None:
    shards = write_corpus(tmp_path, 5, 3, log=quiet)
    samples = [sample for shard in shards for sample in read_tar(shard)]
    assert [key for key, _ in samples] == ["000000000", "000000001", "000000002", "000010000", "000010001"]
    for _, members in samples:
        about = json.loads(members["json"])
        assert {tuple(fact) for fact in about["said"]} <= {tuple(fact) for fact in about["facts"]}
        assert ["kind", about["kind"]] in about["said"] and members["txt"] and members["jpg"][:2] == b"\xff\xd8"


def test_another_corpus_in_the_folder_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path, 2, 2, log=quiet)
    with pytest.raises(DataError, match="holds another corpus .*'seed': 0.*'seed': 1.* name another folder"):
        write_corpus(tmp_path, 2, 2, seed=1, log=quiet)
