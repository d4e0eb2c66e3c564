"""What a row of a corpus costs beside the bare read of its bytes, side by side in one run.

A corpus of drawn numbers in the layout of Weights2Weights (rank 1 on q and v of SD1.5's attention) is written to a
temporary folder. Then, in turns: rows at random places through `Corpus.gather`, and the same bytes by `os.pread` in the
order of the disk; and the whole corpus through `Corpus.blocks`, and by `readinto`. Cold: the files' pages are dropped
before each (`posix_fadvise`). Ours give fp32 with the scales multiplied in, in memory that is used again; the bare
reads give bytes. A result is the median over the rounds.

    python benchmarks/corpus_store.py [--rows 4000] [--random 512] [--rounds 5] [--folder DIR] [--out FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lit_personalize.corpus.layout import Layout
from lit_personalize.corpus.shards import Shard
from lit_personalize.corpus.store import Corpus
from lit_personalize.report.circumstances import circumstances

BLOCKS = [(320, "down_blocks.0", 2), (640, "down_blocks.1", 2), (1280, "down_blocks.2", 2), (1280, "mid_block", 1),
          (1280, "up_blocks.1", 3), (640, "up_blocks.2", 3), (320, "up_blocks.3", 3)]  # fmt: skip
TEXT = 768


def layout() -> Layout:
    """Of 64 layers, D = 99,648."""
    shapes = {}
    for width, block, count in BLOCKS:
        for number in range(count):
            for attention, inputs in (("attn1", width), ("attn2", TEXT)):
                place = f"unet.{block}.attentions.{number}.transformer_blocks.0.{attention}"
                shapes[f"{place}.to_q"] = ((1, width), (width, 1))
                shapes[f"{place}.to_v"] = ((1, inputs), (width, 1))
    return Layout.from_shapes(shapes, dict.fromkeys(shapes, 27.0))


def write(folder: Path, rows: int, shard_rows: int) -> Corpus:
    """Numbers as trained ones are large: A around 1/√in, B a thousandth of it."""
    corpus = Corpus.create(folder, layout(), base_fingerprint="none", init_seed=0, shard_rows=shard_rows)
    draws = torch.Generator().manual_seed(0)
    for first in range(0, rows, shard_rows):
        n = min(shard_rows, rows - first)
        block = 0.05 * torch.randn(n, corpus.width, generator=draws)
        for name, view in corpus.layout.views(block).items():
            view.mul_(1e-3 if name.endswith("B") else 1.0)
        corpus.append(block, [{"id": f"{i:06d}"} for i in range(first, first + n)])
    return corpus


def drop(folder: Path) -> None:
    """Let the system forget the files' pages; those that are mapped would stay, and a corpus leaves none."""
    for path in folder.glob("shard-*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def resident(folder: Path) -> float:
    """The share of the files' pages that are in memory (`mincore`)."""
    libc = ctypes.CDLL(None, use_errno=True)
    inside = total = 0
    for path in folder.glob("shard-*"):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            pages = -(-len(mapped) // mmap.PAGESIZE)
            found = (ctypes.c_ubyte * pages)()
            view = ctypes.c_char.from_buffer(mapped)
            place = ctypes.c_void_p(ctypes.addressof(view))
            if libc.mincore(place, ctypes.c_size_t(len(mapped)), found):
                raise OSError(ctypes.get_errno(), "mincore")
            del view
            inside += sum(page & 1 for page in found)
            total += pages
    return inside / total


class Bare:
    """Reads the same bytes, and makes nothing of them."""

    def __init__(self, folder: Path):
        corpus = Corpus.open(folder)
        sizes = [s.size for s in corpus.layout.slices]
        self.files, self.places = [], []
        for told in json.loads(corpus.index.schema.metadata[b"litp.shards"]):
            shard = Shard(folder / told["file"], told["rows"], corpus.width, corpus.dtype, sizes)
            self.files.append(os.open(folder / told["file"], os.O_RDONLY))
            self.size = shard.stored[0].nbytes
            self.places += [(self.files[-1], shard.first + row * self.size) for row in range(told["rows"])]
        self.buffer = bytearray(8 * 2**20)

    def gather(self, rows: list[int]) -> None:
        for row in sorted(rows):
            file, place = self.places[row]
            if len(os.pread(file, self.size, place)) != self.size:
                raise OSError("a short read")

    def scan(self) -> None:
        for file in self.files:
            os.lseek(file, 0, os.SEEK_SET)
            while os.readv(file, [self.buffer]):
                pass


def timed(work: Callable[[], object], folder: Path, cold: bool) -> tuple[float, float]:
    """Seconds, and the share of the files' pages that was in memory before."""
    if cold:
        drop(folder)
    else:
        work()
    inside = resident(folder)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start, inside


def measure(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """Seconds of both, and the ratio of the medians."""
    bare, chance = Bare(folder), random.Random(0)
    total = len(bare.places)
    report: dict[str, Any] = {}
    for name, cold in (("random rows, cold", True), ("random rows, warm", False), ("full scan, cold", True),
                       ("full scan, warm", False)):  # fmt: skip
        seconds: dict[str, list[float]] = {"ours": [], "bare": []}
        shares: list[float] = []
        for round_ in range(rounds):
            rows = chance.sample(range(total), count)
            corpus = Corpus.open(folder)
            works = _scans(corpus, bare) if name.startswith("full") else _gathers(corpus, bare, rows)
            for who in sorted(works, reverse=bool(round_ % 2)):
                spent, inside = timed(works[who], folder, cold)
                seconds[who].append(spent)
                shares.append(inside)
        medians = {who: statistics.median(values) for who, values in seconds.items()}
        read = bare.size * (count if name.startswith("random") else total)
        report[name] = {
            "ours s": round(medians["ours"], 4), "bare s": round(medians["bare"], 4),
            "ratio": round(medians["ours"] / medians["bare"], 2), "ours GB/s": round(read / 1e9 / medians["ours"], 2),
            "pages in memory before": [round(min(shares), 3), round(max(shares), 3)],
            "ratios of rounds": sorted(round(a / b, 2) for a, b in zip(seconds["ours"], seconds["bare"], strict=True)),
        }  # fmt: skip
    return report


def _gathers(corpus: Corpus, bare: Bare, rows: list[int]) -> dict[str, Callable[[], object]]:
    out = torch.zeros(len(rows), corpus.width)
    return {"ours": lambda: corpus.gather(rows, out), "bare": lambda: bare.gather(rows)}


def _scans(corpus: Corpus, bare: Bare) -> dict[str, Callable[[], object]]:
    out = torch.zeros(512, corpus.width)
    return {"ours": lambda: sum(float(block[0, 0]) for block in corpus.blocks(512, out)), "bare": bare.scan}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--random", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shard-rows", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="for the corpus; it is removed again")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary) / "corpus"
        start = time.perf_counter()
        corpus = write(folder, options.rows, options.shard_rows)
        written = time.perf_counter() - start
        errors = corpus.index["error"].to_pylist()
        report = {
            **circumstances(Path(__file__).parent), "rows": len(corpus), "D": corpus.width, "dtype": corpus.dtype,
            "shards": len(list(folder.glob("shard-*"))),
            "bytes": sum(path.stat().st_size for path in folder.glob("shard-*")),
            "index bytes": (folder / "index.parquet").stat().st_size, "write s, drawing included": round(written, 1),
            "largest relative error of a factor": float(f"{max(errors):.3g}"), "random rows": options.random,
            "rounds": options.rounds, **measure(folder, options.random, options.rounds),
        }  # fmt: skip
    text = json.dumps(report, indent=2) + "\n"
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
