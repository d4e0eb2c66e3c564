"""`pack` is killed at random moments and started again: in the end every adapter is a row, exactly once."""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from lit_personalize.backbones.base import Base
from lit_personalize.corpus.packing import pack
from lit_personalize.corpus.store import MANIFEST, Corpus

ADAPTERS = 16


def shards_in(corpus: Path) -> list[Path]:
    return list(corpus.glob("shard-*.safetensors"))


def test_every_adapter_exactly_once(
    base: Base, make_weights: Callable[..., object], finish: Callable[..., Path], tmp_path: Path
) -> None:
    for number in range(ADAPTERS):
        out = finish(f"c{number:02d}", make_weights(number))
    wanted, chance = [f"c{number:02d}" for number in range(ADAPTERS)], random.Random(0)
    start = time.perf_counter()
    whole = pack(out, tmp_path / "whole", base, shard_rows=2)
    of_shard, kills = (time.perf_counter() - start) / len(shards_in(tmp_path / "whole")), 0
    while True:
        before, more = len(shards_in(tmp_path / "c")), chance.randint(0, 2)
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)  # a fork has no other threads
                pack(out, tmp_path / "c", base, shard_rows=2)
                os._exit(0)
            finally:
                traceback.print_exc()
                os._exit(1)
        while len(shards_in(tmp_path / "c")) < min(before + more, ADAPTERS // 2):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, of_shard * (1 + kills / 4)))  # longer each time: also a busy machine gets through
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if (tmp_path / "c" / MANIFEST).exists():
            found = Corpus.open(tmp_path / "c")
            assert found.verify() == [] and found.ids == wanted[: len(found)]
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
        assert kills < 100
    assert kills >= 2
    assert found.ids == wanted and found.fingerprint == whole.fingerprint
    with found.writing():
        pass  # clears what the killed ones left
    assert len(shards_in(tmp_path / "c")) == ADAPTERS // 2
