"""What LAION-400M costs: bytes, core-hours, index, array layout, from rates that one core reaches here.

Rates are in CPU seconds of one thread, so that a busy machine counts little:

* a text encoder of ViT-L/14's size (random weights) on batches of 64 captions, of 16 and of 77 tokens;
* headers, captions and json of a shard whose pictures have the size of LAION's, from the page cache; and on which
  share of the shard's pages these lie;
* training and filling of inverted lists (faiss), per vector, list and dimension.

    python benchmarks/laion_400m.py [--out FILE]     measure, then print the table of docs/retrieval.md
    python benchmarks/laion_400m.py --from FILE      the table alone
"""

from __future__ import annotations

import argparse
import json
import mmap
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAIRS, PER_SHARD = 413e6, 10_000
PICTURE, ABOUT, CAPTION = 22_000, 700, 70
"""Bytes of a picture at 256 px, of img2dataset's json and of a caption: assumed."""
WIDTH = 768
ROW, CANDIDATE = 300, 200
"""Compressed bytes of a caption and its json in the index's table, and in a part: assumed."""
KEEP = 800
TRAINING = 64
"""Vectors per list that train an index."""
TASKS, CORES = 64, 16
"""Of the array that the table shows."""


def cpu(work: Callable[[], Any]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def encoder_rates(folder: Path, layers: int, rounds: int) -> dict[str, float]:
    """Captions per second of one core by their number of tokens."""
    import torch
    from retrieval import write_encoder

    from lit_personalize.metrics.caption_encoder import CaptionEncoder

    encoder = CaptionEncoder(write_encoder(folder, layers))
    rates = {}
    for tokens in (16, 77):
        ids = torch.randint(10, 400, (64, tokens))
        ids[:, -1] = encoder.clip.tokenizer.eos_token_id
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        encoder.embed(batch)
        rates[str(tokens)] = max(len(ids) / cpu(lambda batch=batch: encoder.embed(batch)) for _ in range(rounds))
    return rates


def reading(folder: Path, samples: int, rounds: int) -> dict[str, float]:
    """CPU seconds per 10,000 samples for headers and for captions, and the share of the pages that are touched."""
    import numpy as np

    from lit_datamodules.shard_writer import write_shards
    from lit_datamodules.tar_index import index_tar, read_member

    rng = np.random.default_rng(0)
    sample = {"txt": b"x" * CAPTION, "json": b'{"key": "' + b"x" * (ABOUT - 11) + b'"}'}
    write_shards(({"jpg": rng.bytes(PICTURE), **sample} for _ in range(samples)), folder, samples)
    path = folder / "00000.tar"
    entries = index_tar(path).entries

    def captions() -> None:
        for entry in entries:
            for kind in ("txt", "json"):
                read_member(path, entry.members[kind])

    at = [(m.offset - 512, m.size + 512) for e in entries for k, m in e.members.items() if k != "jpg"]
    at += [(e.members["jpg"].offset - 512, 512) for e in entries]
    page = mmap.PAGESIZE
    touched = {p for start, size in at for p in range(start // page, (start + size - 1) // page + 1)}
    whole = path.stat().st_size
    return {
        "headers": min(cpu(lambda: index_tar(path)) for _ in range(rounds)) * 10_000 / samples,
        "captions": min(cpu(captions) for _ in range(rounds)) * 10_000 / samples,
        "touched": len(touched) * page / whole, "bytes_per_sample": whole / samples,
    }  # fmt: skip


def lists(vectors: int, rounds: int) -> dict[str, float]:
    """CPU seconds of training and filling per vector, list and dimension, and bytes per vector beyond its codes."""
    import faiss
    import numpy as np

    faiss.omp_set_num_threads(1)
    width, count = 128, max(16, vectors // TRAINING)
    rows = np.random.default_rng(0).standard_normal((vectors, width), np.float32)
    index = faiss.index_factory(width, f"IVF{count},SQ8", faiss.METRIC_INNER_PRODUCT)
    train = cpu(lambda: index.train(rows)) / (vectors * count * width)
    add = min(cpu(lambda: index.add(rows)) for _ in range(rounds)) / (vectors * count * width)
    index.nprobe = count
    search = min(cpu(lambda: index.search(rows[:20], 200)) for _ in range(rounds)) / (20 * index.ntotal * width)
    bytes_ = len(faiss.serialize_index(index)) - count * width * 4
    return {"train": train, "add": add, "search": search, "extra_bytes": round(bytes_ / index.ntotal) - width}


def measure(layers: int, samples: int, vectors: int, rounds: int) -> dict[str, Any]:
    """All rates, with the circumstances."""
    import torch

    from lit_personalize.report.circumstances import circumstances

    torch.set_num_threads(1)
    report = circumstances(Path(__file__).parent)
    with tempfile.TemporaryDirectory() as folder:
        report["captions_per_second"] = encoder_rates(Path(folder) / "encoder", layers, rounds)
        report["seconds_per_10000"] = reading(Path(folder) / "shards", samples, rounds)
    report["index"] = lists(vectors, rounds)
    return report


def table(rates: dict[str, Any]) -> str:
    """The table of docs/retrieval.md, computed from the measured rates."""
    captions, read, index = rates["captions_per_second"], rates["seconds_per_10000"], rates["index"]
    shards = PAIRS / PER_SHARD
    tars = PAIRS * read["bytes_per_sample"]
    embed = {tokens: PAIRS / rate / 3600 for tokens, rate in captions.items()}
    io = shards * (read["headers"] + read["captions"]) / 3600
    count = 4 * PAIRS**0.5
    code = WIDTH + index["extra_bytes"]
    train = index["train"] * TRAINING * count * count * WIDTH / 3600
    add = index["add"] * PAIRS * count * WIDTH / 3600
    search = index["search"] * PAIRS * WIDTH
    all_cores = TASKS * CORES
    longest = PER_SHARD / captions["77"] / CORES
    rows = [
        ("pairs; shards of 10,000", "given", f"{PAIRS / 1e6:.0f} M; {shards:,.0f}"),
        (f"tars, {read['bytes_per_sample'] / 1e3:.1f} kB a pair", "assumed", tera(tars)),
        ("of that, pages with headers, captions, json", "modelled",
         f"{read['touched']:.0%}, {tera(tars * read['touched'])}"),
        ("reading headers, captions, json from memory", "measured", f"{io:,.0f} core-hours"),
        ("embedding captions of 16 tokens", "measured", f"{embed['16']:,.0f} core-hours"),
        ("embedding captions of 77 tokens, the longest", "measured", f"{embed['77']:,.0f} core-hours"),
        (f"array of {TASKS} tasks with {CORES} cores", "modelled",
         f"{shards / TASKS:,.0f} shards a task, {embed['16'] / all_cores:.0f} to {embed['77'] / all_cores:.0f} hours"),
        ("what a killed task repeats: one shard at most", "modelled", f"{longest / 60:.1f} minutes"),
        (f"reading that keeps these {all_cores:,} cores busy", "modelled",
         f"{tars / (embed['16'] * 3600 / all_cores) / 1e6:,.0f} MB/s"),
        (f"parts, {KEEP} candidates a shard and query", "assumed", f"{shards * KEEP * CANDIDATE / 1e9:.1f} GB a query"),
        (f"embeddings, fp16, {WIDTH} wide", "exact", f"{PAIRS * WIDTH * 2 / 1e9:,.0f} GB"),
        (f"table of captions and json, {ROW} B each", "assumed", f"{PAIRS * ROW / 1e9:,.0f} GB"),
        (f"index, SQ8, {code} B a vector, held in memory", "measured", f"{PAIRS * code / 1e9:,.0f} GB"),
        (f"training of {count:,.0f} lists, with {TRAINING * count * WIDTH * 4 / 1e9:.0f} GB of vectors", "modelled",
         f"{train:,.0f} core-hours"),
        ("filling them", "modelled", f"{add:,.0f} core-hours"),
        ("one query, a tenth / a hundredth of the lists", "modelled",
         f"{search / 10:.0f} / {search / 100:.1f} core-seconds"),
    ]  # fmt: skip
    lines = ["| LAION-400M | | |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def tera(count: float) -> str:
    return f"{count / 1e12:.1f} TB"


def main() -> None:
    parser = argparse.ArgumentParser(description="What LAION-400M costs.")
    parser.add_argument("--layers", type=int, default=12, help="of the text transformer; ViT-L/14 has 12")
    parser.add_argument("--samples", type=int, default=2000, help="in the shard that is read")
    parser.add_argument("--vectors", type=int, default=64_000, help="in the index")
    parser.add_argument("--rounds", type=int, default=3, help="the best of which counts")
    parser.add_argument("--from", dest="known", type=Path, help="take the rates from this file")
    parser.add_argument("--out", type=Path, help="also write the rates here")
    options = parser.parse_args()
    if options.known:
        rates = json.loads(options.known.read_text(encoding="utf-8"))
    else:
        rates = measure(options.layers, options.samples, options.vectors, options.rounds)
    if options.out:
        options.out.write_text(json.dumps(rates, indent=2) + "\n", encoding="utf-8")
    print(table(rates))


if __name__ == "__main__":
    main()
