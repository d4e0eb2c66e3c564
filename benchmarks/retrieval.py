"""Speed of retrieval and streaming, each against what bounds it, side by side in one run on one machine.

* scan: captions per second of `scan_shard` against the encoder alone on the same captions in the same batches. The
  encoder has the size of ViT-L/14's text transformer and random weights.
* stream: pictures per second of a streamed set against a bare `webdataset` pipeline with the same decoding and view.
* index: one query over a million vectors against the exact comparison with all of them (faiss, flat), and the share of
  its 200 nearest that the index finds. The vectors are captions of the embedded world under its CLIP, each with noisy
  copies.

    python benchmarks/retrieval.py [--captions 192] [--pictures 256] [--vectors 1000000] [--rounds 9] [--out FILE]
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lit_datamodules.image_files import decode_image
from lit_datamodules.order import PRIOR, Slot
from lit_datamodules.retrieval.plan import Plan, Query
from lit_datamodules.retrieval.scan import scan_shard
from lit_datamodules.shard_sets import read_shards
from lit_datamodules.shard_writer import write_shards
from lit_datamodules.training_view import Geometry, decide, pixels_of
from lit_personalize.cli.console import configure_logging
from lit_personalize.metrics.caption_encoder import CaptionEncoder
from lit_personalize.report.circumstances import circumstances
from lit_personalize.tinyworld.build import committed_weights
from lit_personalize.tinyworld.captions import caption
from lit_personalize.tinyworld.dataset import sample_pictures
from lit_personalize.tinyworld.scene import sample_split

ASKED = {"scan": 0.9, "stream": 0.9, "index": 10.0}
"""At least these ratios; of the index beside a recall of 0.95."""
NEAREST = 200


def write_encoder(folder: Path, layers: int) -> Path:
    """A CLIPModel whose text transformer is as wide as ViT-L/14's, with random weights and a small image tower."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    from lit_personalize.tinyworld.clip import image_processor
    from lit_personalize.tinyworld.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(folder)
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=layers, num_attention_heads=12,
        max_position_embeddings=77, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                              image_size=64, patch_size=32)  # fmt: skip
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=768)
    CLIPModel(config).save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


def turns(rounds: int, first: Callable[[], float], second: Callable[[], float]) -> dict[str, Any]:
    """Run both in turns, beginning with each in turn; the median ratio of rates, both in units per second."""
    pairs = []
    for number in range(rounds):
        rates = [work() for work in ((first, second) if number % 2 else (second, first))]
        pairs.append((rates[0], rates[1]) if number % 2 else (rates[1], rates[0]))
    ratios = [a / b for a, b in pairs]
    ours, theirs = (statistics.median(rates) for rates in zip(*pairs, strict=True))
    return {
        "ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios), "ours": ours, "other": theirs
    }  # fmt: skip


def timed(count: int, work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return count / (time.perf_counter() - start)


def scan(work: Path, captions: int, layers: int, rounds: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    said = sorted((caption(sample_split(rng, "train"), rng) for _ in range(captions)), key=len)  # as a scan does
    picture = rng.bytes(40_000)  # no byte of it is read
    write_shards(({"jpg": picture, "txt": text.encode(), "json": b"{}"} for text in said), work / "scan", 10_000)
    encoder = CaptionEncoder(write_encoder(work / "encoder", layers))
    plan = Plan((Query("q", text="a photo of a star"),), encoder.fingerprint, batch_size=64)
    query = encoder.texts(["a photo of a star"])

    def alone() -> None:
        for start in range(0, captions, plan.batch_size):
            encoder.texts(said[start : start + plan.batch_size])

    def scanned() -> None:
        scan_shard(work / "scan/00000.tar", "00000.tar", plan, encoder, query)

    alone()
    return turns(rounds, lambda: timed(captions, scanned), lambda: timed(captions, alone))


def stream(work: Path, pictures: int, rounds: int) -> dict[str, Any]:
    import webdataset as wds

    shown = sample_pictures(pictures, 1).pixels
    samples = []
    for pixels in shown:
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((512, 512), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
        samples.append({"jpg": buffer.getvalue(), "txt": b"a picture", "json": b"{}"})
    write_shards(samples, work / "stream", 100)
    geometry = Geometry(512, 8)
    pattern = str(work / "stream/*.tar")
    streamed = read_shards(0, pattern, 1434, stream=True).samples

    def ours() -> None:
        for number, sample in enumerate(streamed):
            pixels_of(sample, decide(sample, Slot(number, PRIOR, number, 0, (512, 512)), geometry))

    def bare() -> None:
        still = streamed[0]
        shards = [str(path) for path in sorted((work / "stream").glob("*.tar"))]
        for number, item in enumerate(wds.WebDataset(shards, shardshuffle=False)):
            sample = type(still)(decode_image(item["jpg"], item["__key__"]).pixels, (512, 512), ("a",), "", PRIOR)
            pixels_of(sample, decide(sample, Slot(number, PRIOR, number, 0, (512, 512)), geometry))

    ours()
    return turns(rounds, lambda: timed(pictures, ours), lambda: timed(pictures, bare))


def index(vectors: int, rounds: int) -> dict[str, Any]:
    import faiss

    rng = np.random.default_rng(0)
    encoder = CaptionEncoder(committed_weights() / "clip")
    said = [caption(sample_split(rng, "train"), rng) for _ in range(max(200, vectors // 50))]
    seeds = np.concatenate([encoder.texts(said[i : i + 256]) for i in range(0, len(said), 256)])
    noise = rng.standard_normal((vectors, seeds.shape[1]), np.float32) / seeds.shape[1] ** 0.5
    rows = seeds[rng.integers(len(seeds), size=vectors)] + 0.3 * noise
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    queries = encoder.texts([caption(sample_split(rng, "test"), rng) for _ in range(20)])
    lists = max(1, min(int(4 * vectors**0.5), vectors // 64))
    approximate = faiss.index_factory(rows.shape[1], f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    approximate.train(rows[rng.choice(vectors, min(vectors, 64 * lists), replace=False)])
    approximate.add(rows)
    exact = faiss.IndexFlatIP(rows.shape[1])
    exact.add(rows)
    nearest = exact.search(queries, NEAREST)[1]
    found: dict[str, Any] = {}
    for share in (0.01, 0.03, 0.1):
        approximate.nprobe = max(1, round(share * lists))
        # Four times as many are compared again in full precision, as `vector_index.search` does with ten times.
        near = approximate.search(queries, 4 * NEAREST)[1]
        again = [np.argsort(-(rows[ids] @ q), kind="stable")[:NEAREST] for q, ids in zip(queries, near, strict=True)]
        recall = np.mean([len(set(ids[order]) & set(true)) / NEAREST
                          for ids, order, true in zip(near, again, nearest, strict=True)])  # fmt: skip

        def ours() -> None:
            for q in queries:
                ids = approximate.search(q[None], 4 * NEAREST)[1][0]
                np.argsort(-(rows[ids] @ q), kind="stable")[:NEAREST]

        def flat() -> None:
            for q in queries:
                exact.search(q[None], NEAREST)

        speed = turns(rounds, lambda: timed(len(queries), ours), lambda: timed(len(queries), flat))
        found[f"probes {share:g}"] = {**speed, "recall": float(recall)}
    good = [row for row in found.values() if row["recall"] >= 0.95]
    best = max((row["ratio"] for row in good), default=0.0)
    return {"vectors": vectors, "width": int(rows.shape[1]), "lists": lists, "ratio": best, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of retrieval and streaming.")
    parser.add_argument("--captions", type=int, default=192)
    parser.add_argument("--layers", type=int, default=12, help="of the text transformer; ViT-L/14 has 12")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="also write the results here")
    options = parser.parse_args()
    configure_logging()
    report = circumstances(Path(__file__).parent) | {"rounds": options.rounds}
    with tempfile.TemporaryDirectory() as folder:
        report["scan"] = scan(Path(folder), options.captions, options.layers, options.rounds)
        report["stream"] = stream(Path(folder), options.pictures, options.rounds)
        report["index"] = index(options.vectors, options.rounds)
    for name, least in ASKED.items():
        report[name] |= {"asked": least, "reached": report[name]["ratio"] >= least}
    text = json.dumps(report, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
