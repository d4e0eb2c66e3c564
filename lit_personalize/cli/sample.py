"""`litp sample`: draw pictures with a base and adapter files."""

from __future__ import annotations

import argparse
from pathlib import Path

from lit_personalize.cli.console import add_device, add_json, configure_logging, emit


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="litp sample", description="Draw pictures with a base and adapters.")
    parser.add_argument("prompts", nargs="+", help="one picture per prompt and seed")
    parser.add_argument("--base", default="tinyworld", help='diffusers directory, single file, or "tinyworld"')
    parser.add_argument("--base-config", default=None, help="configs and tokenizers of a single-file base")
    parser.add_argument("--adapter", action="append", default=[], metavar="FILE|FOLDER[@SCALE]", help="may be repeated")
    parser.add_argument("--k-lora", nargs=2, metavar=("CONTENT", "STYLE"),
                        help="two LoRAs of which each layer applies one at a time, the style's later")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=6.0)
    parser.add_argument("--negative", default="")
    parser.add_argument(
        "--mix", type=float, nargs="+", metavar="ALPHA", default=None,
        help="draw between two prompts: text states (1 - ALPHA) of the first and ALPHA of the second",
    )  # fmt: skip
    parser.add_argument("--slerp", action="store_true", help="mix along the sphere, token by token")
    parser.add_argument("--scheduler", choices=("ddim", "dpm", "euler"), default="ddim")
    parser.add_argument("--resolution", type=int, default=None)
    parser.add_argument("--force", action="store_true", help="accept an adapter that was made for another base")
    parser.add_argument("-o", "--output", type=Path, default=Path("samples"), help="folder for pictures and grid.png")
    add_json(parser)
    add_device(parser)
    return parser


def path_and_scale(entry: str) -> tuple[Path, float]:
    """Split `PATH@SCALE`; the scale may be missing, and a path that exists may hold an @ itself.

    Raises:
        UsageError: What stands behind the @ is no number.
    """
    from lit_personalize.errors import UsageError

    path, at, scale = entry.rpartition("@")
    if not at or Path(entry).exists():
        return Path(entry), 1.0
    try:
        return Path(path), float(scale)
    except ValueError as error:
        raise UsageError(f"--adapter {entry}: {scale!r} behind the @ is no number; write FILE@0.8") from error


def exports_of(place: Path) -> Path:
    """A run's exports, or the file or folder itself."""
    return place / "exports" if (place / "exports").is_dir() else place


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    configure_logging()
    from PIL import Image

    from lit_personalize.adapters.klora import KLoRA
    from lit_personalize.backbones.loading import load_base
    from lit_personalize.devices import device_of
    from lit_personalize.errors import UsageError
    from lit_personalize.export.loading import load_adapter, read_adapter
    from lit_personalize.sampling.grid import captioned_grid
    from lit_personalize.sampling.mixing import Mix, Prompt
    from lit_personalize.sampling.sampler import SamplingOptions, generate

    asked: list[Prompt] = list(options.prompts)
    if options.mix is not None:
        if len(asked) != 2:
            raise UsageError(f"--mix draws between two prompts, not {len(asked)}")
        first, second = options.prompts
        asked = [Mix(first, second, alpha, options.slerp) for alpha in options.mix]
    elif options.slerp:
        raise UsageError("--slerp says how --mix goes from one prompt to the other; give --mix 0 0.5 1")
    base = load_base(options.base, config=options.base_config, device=device_of(options.device))
    adapters = []
    for entry in options.adapter:
        path, scale = path_and_scale(entry)
        adapters.append(load_adapter(exports_of(path), base, scale, options.force))
    if options.k_lora:
        content, style = (read_adapter(exports_of(Path(p)), base, options.force) for p in options.k_lora)
        adapters.append(KLoRA(content, style))
        adapters[-1].attach(base)
    prompts = [p for p in asked for _ in options.seeds]
    seeds = options.seeds * len(asked)
    how = SamplingOptions(options.steps, options.guidance, options.negative, options.scheduler)
    pictures = generate(base, prompts, seeds, adapters, how, options.resolution)
    options.output.mkdir(parents=True, exist_ok=True)
    drawn = []
    for i, pixels in enumerate(pictures):
        path = options.output / f"{i // len(options.seeds):02d}_{seeds[i]}.png"
        Image.fromarray(pixels).save(path)
        drawn.append({"file": str(path), "prompt": str(prompts[i]), "seed": seeds[i]})
    zoom = max(1, 256 // pictures.shape[1])
    grid = options.output / "grid.png"
    captioned_grid(pictures, [str(p) for p in prompts], len(options.seeds), zoom).save(grid)
    if options.json:
        emit({"pictures": drawn, "grid": str(grid)}, True)
    else:
        print(*(picture["file"] for picture in drawn), grid, sep="\n")
    return 0
