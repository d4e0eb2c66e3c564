"""`litp data check|sheet`: what a configuration's pictures and captions become; the other verbs have their files."""

from __future__ import annotations

import argparse
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from lit_personalize.cli.console import add_allow, add_json, allowed_by, configure_logging, emit

log = logging.getLogger(__name__)


def native_geometry(base: str, config: str | None = None) -> tuple[int, int] | None:
    """Native side of a base in pixels, and pixels per latent cell, from its configs alone.

    None, with a warning, where the base is not at hand: pictures can be checked before it is.

    Raises:
        DataError: A config lacks what is asked, or is no JSON.
    """
    from lit_personalize.backbones.loading import resolve
    from lit_personalize.errors import DataError

    try:
        folder: Any = resolve(base)
        folder = folder if folder.is_dir() else config and resolve(config)
    except DataError as error:
        log.warning("%s. Views and masks are those of a base with 512 px and 8 pixels per latent cell", error)
        return None
    if not folder:
        log.warning("%s is a single file without base_config: views are those of a base with 512 px", base)
        return None
    try:
        unet, vae = (json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae"))
        downscale = 2 ** (len(vae["block_out_channels"]) - 1)
        return int(unet["sample_size"]) * downscale, downscale
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot read the configs of unet and vae in {folder}: {error!r}; copy it again") from error


def main(arguments: list[str]) -> int:
    if arguments[:1] in (["retrieve"], ["index"], ["cache"]):
        from lit_personalize.cli import cache, retrieve

        own = {"retrieve": retrieve.main, "index": retrieve.index, "cache": cache.main}
        return own[arguments[0]](arguments[1:])
    parser = argparse.ArgumentParser(prog="litp data", description="Check or show the data of a configuration.")
    verbs = parser.add_subparsers(dest="what", required=True, metavar="check|sheet|cache|retrieve|index")
    for name, text in (("check", "read every file and count what is used"), ("sheet", "draw the first training views")):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("-c", "--config", action="append", required=True, help="YAML file or recipe; may be repeated")
        add_json(verb)
        add_allow(verb)
        default = Path("sheet.png" if name == "sheet" else "manifest.jsonl")
        verb.add_argument("-o", "--output", type=Path, default=default)
    verbs.add_parser("retrieve", help="find pictures for a regularization set in image-text shards", add_help=False)
    verbs.add_parser("cache", help="encode pictures and captions of a configuration once, for all runs", add_help=False)
    verbs.add_parser("index", help="embed the captions of image-text shards for many retrievals", add_help=False)
    options = parser.parse_args(arguments)
    configure_logging()
    from lit_personalize.configuration import instantiate, parse

    given = [part for config in options.config for part in ("-c", config)]
    given += ["--name", "data"]  # a configuration without a name has data, too
    parser_, config = parse([*given, *allowed_by(options)])
    model = config["model"].init_args
    del config["model"]  # reading pictures needs no weights
    data = instantiate(parser_, config).data
    if native := native_geometry(model.base, model.base_config):
        data.suit(*native)
    data.cache_latents = False  # nothing is encoded here
    for later in [r for r in data.regularization if r.generate]:
        log.warning("left out: %d pictures of %r; `litp fit` draws them", later.generate, later.prompt)
        data.regularization.remove(later)
    try:
        data.setup("fit")
    finally:
        if options.what == "check":
            data.write_manifest(options.output)
    if options.what == "sheet":
        data.write_sheet(options.output)
        if not options.json:
            print(options.output)
            return 0
    fates = Counter(record.fate for record in data.records)
    written = "sheet" if options.what == "sheet" else "manifest"
    emit({"files": len(data.records), **fates, written: str(options.output)}, options.json)
    return 0
