"""`litp import`: an adapter of another program, pickles included, as files of ours."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from lit_personalize.cli.console import add_device, add_json, configure_logging, emit


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="litp import",
        description="Take an adapter of another program into .safetensors: Custom Diffusion's delta.bin or .ckpt, "
        "diffusers' pytorch_custom_diffusion_weights.bin with its <new1>.bin, and any LoRA or embedding, also pickled. "
        "Of a pickle only the tensors are read; one that could run code is refused.",
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="the files of one adapter")
    parser.add_argument("--base", required=True, help="what it was trained on: diffusers directory or single file")
    parser.add_argument("--base-config", default=None, help="configs and tokenizers of a single-file base")
    parser.add_argument("-o", "--output", type=Path, required=True, help="new folder for the files")
    parser.add_argument("--tokens", nargs="+", default=[], metavar="TOKEN", help="other names, in the file's order")
    formats = "diffusers kohya peft delta pipeline; default: the exact changes"
    parser.add_argument("--formats", nargs="+", default=[], help=formats)
    add_json(parser)
    add_device(parser)
    options = parser.parse_args(arguments)
    configure_logging()
    from lit_personalize.backbones.loading import load_base
    from lit_personalize.devices import device_of
    from lit_personalize.export.importing import import_files

    base = load_base(options.base, config=options.base_config, device=device_of(options.device))
    emit(asdict(import_files(options.files, base, options.output, options.tokens, options.formats)), options.json)
    return 0
