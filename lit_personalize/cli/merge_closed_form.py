"""`litp merge closed-form`: concepts of Custom Diffusion into one adapter, without training."""

from __future__ import annotations

import argparse
from pathlib import Path

from lit_personalize.cli.console import base_of, configure_logging
from lit_personalize.cli.merge_arithmetic import add_output, show


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="litp merge closed-form",
        description="Merge concepts that were learned one by one on cross-attention's K and V (Custom Diffusion). "
        "What each concept's words mean to its own adapter, they mean to the merged one; other captions change least.",
    )
    parser.add_argument("--concept", action="append", nargs=2, default=[], metavar=("FILE|FOLDER", "NOUN"),
                        help="an adapter or run, and its class noun: runs/cat cat; of a style, a phrase with {}: "
                        "runs/ink 'painting in the style of {}'; twice or more")  # fmt: skip
    parser.add_argument("--captions", type=Path, required=True,
                        help="captions in which nothing should change: a text file with one per line, a shard such as "
                        "that of `litp data retrieve`, or a folder of shards")  # fmt: skip
    parser.add_argument("--most", type=int, default=1000, help="captions that are taken, the first ones")
    parser.add_argument("--ridge", type=float, default=0.0, help="for fewer captions than the states are wide: 1e-6")
    add_output(parser)
    return parser


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    configure_logging()
    from lit_personalize.export.loading import exports_of, read_adapter
    from lit_personalize.merging.arithmetic import Energy
    from lit_personalize.merging.closed_form import Concept, merge_concepts
    from lit_personalize.merging.writing import MergeReport, check_output, write_merged

    places = [exports_of(Path(place)) for place, _ in options.concept]
    check_output(options.output, places, options.formats)
    captions = read_captions(options.captions, options.most)
    base = base_of(options)
    concepts = [
        Concept(read_adapter(place, base, options.force), phrase)
        for place, (_, phrase) in zip(places, options.concept, strict=True)
    ]
    weights, found = merge_concepts(base, concepts, captions, options.ridge)
    named = [
        {"name": str(place), "strength": 1.0, "layers": len(concept.weights.layers())}
        for place, concept in zip(places, concepts, strict=True)
    ]
    report = MergeReport("closed-form", str(options.output), named, extra=found)
    write_merged(weights, Energy(), report, base, options.formats, not options.no_verify, options.prompt)
    show(report, options.json)
    return 0


def read_captions(place: Path, most: int) -> list[str]:
    """The first captions of a text file, a shard, or a folder of shards.

    Raises:
        DataError: The place is missing or holds no caption.
    """
    from lit_datamodules.tar_index import index_tar, read_member
    from lit_personalize.errors import DataError

    if place.is_dir():
        shards = sorted(place.glob("*.tar"))
    elif place.suffix == ".tar":
        shards = [place]
    else:
        try:
            lines = [line.strip() for line in place.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read captions from {place}: {error}") from error
        return _some([line for line in lines if line][:most], place)
    found: list[str] = []
    for shard in shards:
        for entry in index_tar(shard).entries:
            if "txt" in entry.members and len(found) < most:
                found.append(read_member(shard, entry.members["txt"]).decode("utf-8", "replace").strip())
    return _some(found, place)


def _some(captions: list[str], place: Path) -> list[str]:
    from lit_personalize.errors import DataError

    if not captions:
        raise DataError(f"{place} holds no caption; give a text file with one per line, or shards")
    return captions
