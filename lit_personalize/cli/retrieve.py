"""`litp data retrieve|index`: a regularization set from image-text shards."""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

from lit_personalize.cli.console import add_device, add_json, configure_logging, emit, task_of

SHARDS = (
    "'laion/{00000..00331}.tar', a URL such as 's3://bucket/{00000..00331}.tar', or 'pipe:COMMAND'; may be repeated"
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="litp data retrieve",
        description="Find pictures whose captions mean what a query means, and pack them as a regularization set.",
        epilog="Without shards, --generate N lets the base draw the set: litp data retrieve --generate N --help",
    )
    parser.add_argument("--query", action="append", default=[], help="a sentence: 'photo of a cat'; may be repeated")
    picture = "a picture as query, or a folder of pictures that ask together; may be repeated"
    parser.add_argument("--image", action="append", default=[], type=Path, help=picture)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the set")
    _add_encoder(parser)
    wanted = parser.add_argument_group("what is kept")
    wanted.add_argument("--n", type=int, default=200, help="pictures per query")
    wanted.add_argument("--min-similarity", type=float, help="least cosine, on the scale of this CLIP")
    wanted.add_argument("--percentile", type=float, help="instead: percent of captions that lie below")
    wanted.add_argument("--near-duplicates", type=int, default=4, help="bits of 64 in which hashes must differ")
    wanted.add_argument("--min-side", type=int, help="pixels of the shorter side")
    wanted.add_argument("--max-punsafe", type=float, help="largest probability of unsafe content")
    wanted.add_argument("--max-watermark", type=float, help="largest probability of a watermark")
    wanted.add_argument("--min-aesthetic", type=float, help="least aesthetic score")
    wanted.add_argument("--licence", action="append", default=[], help="accepted licence; may be repeated")
    wanted.add_argument("--language", action="append", default=[], help="accepted language; may be repeated")
    work = parser.add_argument_group("how it is done")
    work.add_argument("--task", type=task_of, help="I/N: scan the I-th of N shares of the shards, and do not merge")
    work.add_argument("--merge", action="store_true", help="merge what tasks scanned, and scan nothing")
    work.add_argument("--index", type=Path, help="folder that `litp data index` made; nothing is scanned")
    work.add_argument("--probes", type=float, default=0.1, help="share of the index that is looked into, 1 for all")
    work.add_argument("--keep", type=int, help="candidates of a shard per query; default: four times n, at least 800")
    return parser


def _add_encoder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", action="append", required=True, help=SHARDS)
    parser.add_argument("--fetch-to", type=Path, help="folder into which shards that lie elsewhere are fetched")
    keep = "keep them there; otherwise each is removed when its captions were read"
    parser.add_argument("--keep-fetched", action="store_true", help=keep)
    encoder = parser.add_mutually_exclusive_group(required=True)
    encoder.add_argument("--clip", help="directory of the CLIPModel that compares, or tinyworld")
    encoder.add_argument("--text-encoder", help="instead: of a bare CLIPTextModel, whose pooled states are compared; "
                         "their cosines are on another scale, so rather use --percentile")  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=256, help="captions embedded at once")
    add_device(parser)
    add_json(parser)


def _shards(options: argparse.Namespace) -> Any:
    from lit_datamodules.retrieval.retrieve import find_shards
    from lit_personalize.errors import UsageError

    if options.keep_fetched and not options.fetch_to:
        raise UsageError("--keep-fetched keeps what is fetched to a folder: name it by --fetch-to")
    return find_shards(options.shards, options.fetch_to)


def _encoder(options: argparse.Namespace) -> Any:
    from lit_personalize.devices import device_of
    from lit_personalize.metrics.caption_encoder import CaptionEncoder, PooledEncoder
    from lit_personalize.tinyworld.build import committed_weights

    if options.text_encoder:
        return PooledEncoder(options.text_encoder, device_of(options.device))
    folder = committed_weights() / "retrieval_clip" if options.clip == "tinyworld" else Path(options.clip)
    return CaptionEncoder(folder, device_of(options.device))


def index(arguments: list[str]) -> int:
    """`litp data index`."""
    parser = argparse.ArgumentParser(
        prog="litp data index", description="Embed the captions of shards once, for any number of retrievals."
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the index")
    _add_encoder(parser)
    parser.add_argument("--task", type=task_of, help="I/N: embed the I-th of N shares of the shards, and do not build")
    options = parser.parse_args(arguments)
    configure_logging()
    from lit_datamodules.retrieval import vector_index

    vector_index.faiss_module()  # whose absence is better said now
    shards, task = _shards(options), options.task or (0, 1)
    done = vector_index.embed_shards(
        shards, _encoder(options), options.output, options.batch_size, task, options.keep_fetched
    )
    if options.task:
        emit({"shards embedded": done, "next": "the same command without --task, after all tasks"}, options.json)
        return 0
    report = vector_index.build(shards, options.output)
    emit({**report, "shards": report["shards"] if options.json else len(shards)}, options.json)
    return 0


def main(arguments: list[str]) -> int:
    if any(argument.partition("=")[0] == "--generate" for argument in arguments):
        from lit_personalize.cli import generate_set

        return generate_set.main(arguments)
    options = build_parser().parse_args(arguments)
    configure_logging()
    import numpy as np

    from lit_datamodules.retrieval import retrieve
    from lit_datamodules.retrieval.merge import Selection
    from lit_personalize.errors import UsageError

    if sum(map(bool, (options.task, options.merge, options.index))) > 1:
        raise UsageError("--task scans, --merge merges and --index searches; give one of them")
    selection = Selection(options.n, options.min_similarity, options.percentile, options.near_duplicates)
    shards, encoder, out = _shards(options), _encoder(options), options.output
    plan = _plan(options, encoder.fingerprint)
    if options.merge:
        report = retrieve.merge_parts(shards, plan, selection, out)
    else:
        vectors = [encoder.image(*_pictures(q.image)) if q.image else encoder.texts([q.text]) for q in plan.queries]
        queries = np.concatenate(vectors)
        if options.index:
            report = retrieve.merge_index(options.index, shards, plan, queries, selection, out, options.probes)
        else:
            scanned = retrieve.scan(shards, plan, encoder, queries, out, options.task or (0, 1), options.keep_fetched)
            if options.task:
                then = "the same command with --merge, after all tasks"
                emit({"shards scanned": scanned, "next": then}, options.json)
                return 0
            report = retrieve.merge_parts(shards, plan, selection, out)
    if options.json:
        emit(report, True)
        return 0
    _show(report, options.output)
    return 0


def _plan(options: argparse.Namespace, encoder: str) -> Any:
    from lit_datamodules.retrieval.plan import Filters, Plan, Query

    texts = [Query(text, text=text) for text in options.query]
    images = [Query(p.name if p.is_dir() else p.stem, image=str(p), sha256=_hash(p)) for p in options.image]
    filters = Filters(
        options.min_side, options.max_punsafe, options.max_watermark, options.min_aesthetic,
        tuple(options.licence), tuple(options.language),
    )  # fmt: skip
    keep = max(800, 4 * options.n) if options.keep is None else options.keep
    return Plan((*texts, *images), encoder, filters, keep, options.batch_size)


def _pictures(path: str | Path) -> list[Path]:
    """A picture, or those of a folder."""
    from lit_datamodules.image_files import list_images

    return list_images(Path(path)) if Path(path).is_dir() else [Path(path)]


def _hash(path: Path) -> str:
    """Of a picture, or of those of a folder together."""
    from lit_datamodules.shard_writer import sha256_of_file
    from lit_personalize.errors import DataError

    hashes = []
    for picture in _pictures(path):
        try:
            hashes.append(sha256_of_file(picture))
        except OSError as error:
            raise DataError(f"cannot read picture {picture}: {error.strerror}") from error
    return hashes[0] if path.is_file() else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _show(report: dict[str, Any], output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    scanned = report["scanned"]
    title = f"{scanned['captions']} captions of {scanned['samples']} samples in {scanned['shards']} shards"
    table = Table(title=title, title_justify="left")
    for column in ("query", "kept", "similarity", "threshold", "rejected"):
        table.add_column(column)
    for name, row in report["queries"].items():
        spread = row["similarity"]
        shown = f"{spread['min']:.3f} to {spread['max']:.3f}" if spread else ""
        rejected = ", ".join(f"{count} {why}" for why, count in row["rejected"].items())
        table.add_row(name, str(row["kept"]), shown, f"{row['threshold']:.3f}", rejected)
        if not row["complete"]:
            print(f"litp data retrieve: {name}: shards may hold more that passes; raise --keep", file=sys.stderr)
    console = Console(file=sys.stdout)
    console.print(table)
    for name, counts in (("dropped", scanned["dropped"]), ("damaged", {"faults": len(report["faults"])})):
        if told := ", ".join(f"{count} {why}" for why, count in counts.items() if count):
            console.print(f"{name}: {told}")
    console.print(f"{report['pictures']} pictures: {output}/00000.tar ...; the whole story: {output}/retrieval.json")
