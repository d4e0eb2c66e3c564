"""`litp bank pack` and `litp bank get`: finished adapters as rows of a corpus, and back as files."""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lit_personalize.cli.bank_jobs import nothing_more
from lit_personalize.cli.console import add_json, configure_logging, emit

if TYPE_CHECKING:
    from lit_personalize.backbones.base import Base

log = logging.getLogger(__name__)


def add_pack(pack: argparse.ArgumentParser) -> None:
    pack.description = "Add finished adapters to a corpus; what is packed already is left out."
    pack.add_argument("source", type=Path, help="folder of litp bank run; or one of adapter files and PEFT folders; or "
                      "one in Weights2Weights' layout (all_weights.pt, weight_dimensions.pt)")  # fmt: skip
    pack.add_argument("--corpus", type=Path, help="the corpus; default: SOURCE/corpus")
    pack.add_argument("--labels", type=Path, help="csv or parquet with a column id; the others are labels")
    pack.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16",
                      help="of a new corpus; float16 has a scale for each factor")  # fmt: skip
    pack.add_argument("--gauge", choices=("known", "unknown"), help="of a new corpus; unknown takes adapters that did "
                      "not begin from one initial seed, or do not say it; default: known")  # fmt: skip
    pack.add_argument("--init-seed", type=int, help="from which all those began that do not say it")
    pack.add_argument("--alpha", type=float, help="of Weights2Weights' rows without adapter_config.json; theirs is 27")
    pack.add_argument("--shard-rows", type=int, default=512, help="rows of a shard of a new corpus")
    _add_base(pack)
    add_json(pack)


def add_get(get: argparse.ArgumentParser) -> None:
    get.description = "Write adapters of a corpus as LoRA files, and load each into the stock client."
    get.add_argument("ids", nargs="*", metavar="ID", help="adapters, as the corpus's index.parquet names them")
    get.add_argument("--all", action="store_true", help="every adapter")
    get.add_argument("--corpus", type=Path, required=True, help="the corpus")
    get.add_argument("--out", type=Path, default=Path(), help="folder for ID/; default: this one")
    get.add_argument("--formats", nargs="+", default=["diffusers"], help="diffusers kohya peft; or w2w alone: "
                     "all_weights.pt in --out, a pickle of tensors that loads with weights_only=True")  # fmt: skip
    _add_base(get)
    add_json(get)


def _add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", help="what the adapters were trained on; default: what corpus or run names")
    parser.add_argument("--base-config", help="configs and tokenizers of a single-file base")


def pack(options: argparse.Namespace, rest: list[str]) -> int:
    """Add adapters to a corpus, and report."""
    nothing_more(rest)
    configure_logging()
    from lit_personalize.corpus.packing import pack as pack_adapters

    corpus = options.corpus or options.source / "corpus"
    report = pack_adapters(
        options.source, corpus, _base_of(options, corpus, options.source), options.labels, options.dtype, options.gauge,
        options.init_seed, options.alpha, options.shard_rows,
    )  # fmt: skip
    if report.unknown_ids:
        log.warning("%d ids of %s are not in the corpus: %s ...", len(report.unknown_ids), options.labels,
                    ", ".join(report.unknown_ids[:5]))  # fmt: skip
    told = asdict(report)
    counted = {key: len(value) if isinstance(value, (list, dict)) else value for key, value in told.items()}
    emit(told if options.json else {k: v for k, v in counted.items() if v or k == "packed"}, options.json)
    return 0


def get(options: argparse.Namespace, rest: list[str]) -> int:
    """Write adapters of a corpus, and report."""
    nothing_more(rest)
    configure_logging()
    from lit_personalize.corpus import w2w_files
    from lit_personalize.corpus.store import Corpus
    from lit_personalize.corpus.unpacking import write_adapters
    from lit_personalize.errors import UsageError

    corpus = Corpus.open(options.corpus)
    if options.all == bool(options.ids):
        raise UsageError("name the adapters by their ids, or give --all")
    ids = list(corpus.ids) if options.all else options.ids
    if "w2w" in options.formats:
        if options.formats != ["w2w"]:
            raise UsageError("w2w is the format of a whole folder: give it alone")
        files = [str(path) for path in w2w_files.write(corpus, ids, options.out)]
        emit({"adapters": len(ids), "files": files}, options.json)
    else:
        emit(write_adapters(corpus, ids, options.out, _base_of(options, options.corpus), options.formats), options.json)
    return 0


def _base_of(options: argparse.Namespace, corpus: Path, run: Path | None = None) -> Base:
    """The base that is named: by the options, the corpus, or the run's configuration."""
    import yaml

    from lit_personalize.backbones.loading import load_base
    from lit_personalize.corpus.store import MANIFEST, Corpus
    from lit_personalize.errors import UsageError

    source = options.base
    if source is None and (corpus / MANIFEST).is_file():
        source = Corpus.open(corpus).manifest["base"]
    if source is None and run is not None and (run / "config.yaml").is_file():
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        source = config.get("model", {}).get("init_args", {}).get("base")
    if not source:
        raise UsageError("name what the adapters were trained on: --base DIR")
    return load_base(source, config=options.base_config)
