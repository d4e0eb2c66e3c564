"""What one rank finds damaged stands in the records of every rank."""

from __future__ import annotations

from pathlib import Path

import torch.multiprocessing
from torch import distributed

from lit_datamodules.manifest import Record, share_skipped, skip


def rank(number: int, place: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{place}/meet", rank=number, world_size=2)
    records = [Record(name, "used") for name in ("a", "b", "c", "d")]
    skip(records, "d", "cut off")  # which every rank has noticed
    skip(records, "bc"[number], f"seen by rank {number}")
    share_skipped(records)
    distributed.destroy_process_group()
    Path(place, f"{number}.txt").write_text("; ".join(f"{r.path} {r.fate} {r.reason}".strip() for r in records))


def test_skipped_records_are_shared(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(rank, (str(tmp_path),), nprocs=2)
    told = "a used; b skipped seen by rank 0; c skipped seen by rank 1; d skipped cut off"
    assert [(tmp_path / f"{number}.txt").read_text() for number in (0, 1)] == [told, told]
