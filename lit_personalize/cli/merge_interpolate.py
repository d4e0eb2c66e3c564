"""`litp merge interpolate`: the adapter between two adapters, at a share alpha."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lit_personalize.cli.console import add_device, add_json, configure_logging, emit


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="litp merge interpolate",
        description="The adapter between two: changes (1 - alpha) of the first and alpha of the second; rows of their "
        "tokens mixed alike, at the mixed norm. For the text states of two prompts: litp sample A B --mix 0 0.5 1.",
    )
    parser.add_argument("adapters", nargs=2, metavar="FILE|FOLDER", help="adapters, or runs")
    parser.add_argument("--alpha", type=float, default=0.5, help="share of the second, in [0, 1]")
    parser.add_argument("--token", default="", help="name of the mixed token; default: the first adapter's")
    parser.add_argument("--base", default="tinyworld", help='diffusers directory, single file, or "tinyworld"')
    parser.add_argument("--base-config", default=None, help="configs and tokenizers of a single-file base")
    parser.add_argument("--force", action="store_true", help="accept an adapter that was made for another base")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the files; new or empty")
    parser.add_argument("--formats", nargs="+", default=["diffusers", "kohya"], help="diffusers kohya peft pipeline")
    add_json(parser)
    add_device(parser)
    return parser


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    configure_logging()
    from lit_personalize.backbones.loading import load_base
    from lit_personalize.devices import device_of
    from lit_personalize.errors import UsageError
    from lit_personalize.export.exporter import export
    from lit_personalize.export.loading import read_adapter
    from lit_personalize.export.verify import verify
    from lit_personalize.merging.interpolation import interpolate
    from lit_personalize.merging.sources import matrices_only
    from lit_personalize.sampling.cells import exports_of

    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        raise UsageError(f"{options.output} is not an empty folder; name a new one with -o")
    base = load_base(options.base, config=options.base_config, device=device_of(options.device))
    paths = [Path(given) for given in options.adapters]
    first, second = (matrices_only(read_adapter(exports_of(p), base, options.force), str(p)) for p in paths)
    weights = interpolate(first, second, options.alpha, options.token)
    details = {"merge": "interpolate", "of": [str(path) for path in paths], "alpha": options.alpha}
    files = export(weights, options.output, base, options.output.name, options.formats, details)
    checked = verify(files, base, weights, prompt=f"a photo of {' and '.join(weights.tokens) or 'something'}")
    told: dict[str, Any] = {
        **details, "tokens": sorted(weights.tokens), "layers": len(weights.layers()),
        "files": [str(file.path) for file in files],
        "largest_error": max((f.largest_error for f in checked.files), default=0.0),
    }  # fmt: skip
    if options.json:
        emit(told, True)
    else:
        print(*told["files"], sep="\n")
    return 0
