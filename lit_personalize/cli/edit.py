"""`litp edit`: change the words of a prompt and keep the picture, drawn or photographed; show where words act."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lit_personalize.cli.console import add_device, add_json, configure_logging, emit


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="litp edit",
        description="Draw a prompt and changed versions of it with the same composition (prompt-to-prompt).",
    )
    parser.add_argument("source", help="what the picture shows; with --photo, what the photo shows")
    parser.add_argument("edits", nargs="*", metavar="edit", help="changed prompts; may be left out")
    parser.add_argument("--photo", type=Path, help="edit this picture; its middle square is taken")
    parser.add_argument("--kind", choices=("auto", "replace", "refine"), default="auto",
                        help="replace: word by word; refine: keep what both have; auto: by the word count")  # fmt: skip
    parser.add_argument("--weigh", action="append", default=[], metavar="WORD=FACTOR",
                        help="more or less of a word; without an edit, of the source; may be repeated")  # fmt: skip
    parser.add_argument("--cross-share", type=float, default=0.8, help="of steps with the source's cross-attention")
    parser.add_argument("--self-share", type=float, default=0.4, help="of steps with the source's self-attention")
    parser.add_argument("--self-side", type=int, default=None,
                        help="largest self-attention maps taken over; a quarter of the latent's side")  # fmt: skip
    parser.add_argument("--heat-maps", type=int, nargs="?", const=0, default=None, metavar="SIDE",
                        help="also draw where each word acts, by layers of SIDE cells or by all")  # fmt: skip
    parser.add_argument("--inversion", choices=("null-text", "ddim"), default=None,
                        help="of the photo; null-text unless guidance is 1")  # fmt: skip
    parser.add_argument("--refinements", type=int, default=0, help="fixed-point iterations of each inversion step")
    parser.add_argument("--base", default="tinyworld", help='diffusers directory, single file, or "tinyworld"')
    parser.add_argument("--base-config", default=None, help="configs and tokenizers of a single-file base")
    parser.add_argument("--adapter", action="append", default=[], metavar="FILE|FOLDER[@SCALE]", help="may be repeated")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="of drawn pictures; 0 if left out")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=6.0)
    parser.add_argument("--negative", default="")
    parser.add_argument("--resolution", type=int, default=None)
    parser.add_argument("--force", action="store_true", help="accept an adapter that was made for another base")
    parser.add_argument("-o", "--output", type=Path, default=Path("edits"), help="folder for pictures and grid.png")
    add_json(parser)
    add_device(parser)
    return parser


def weights_of(entries: list[str]) -> dict[str, float]:
    """Read WORD=FACTOR entries.

    Raises:
        UsageError: An entry has no word, or no number behind the =.
    """
    from lit_personalize.errors import UsageError

    weights = {}
    for entry in entries:
        word, _, factor = entry.rpartition("=")
        try:
            weights[word] = float(factor)
        except ValueError as error:
            raise UsageError(f"--weigh {entry}: {factor!r} is no number; write WORD=2") from error
        if not word:
            raise UsageError(f"--weigh {entry} names no word; write WORD=2")
    return weights


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    configure_logging()
    from PIL import Image

    from lit_datamodules.image_files import read_image
    from lit_personalize.backbones.loading import load_base
    from lit_personalize.cli.sample import exports_of, path_and_scale
    from lit_personalize.devices import device_of
    from lit_personalize.errors import UsageError
    from lit_personalize.export.loading import load_adapter
    from lit_personalize.sampling.grid import captioned_grid
    from lit_personalize.sampling.heat_maps import HeatMaps, save_overlays
    from lit_personalize.sampling.inversion import NullTextOptions, invert, latent_of
    from lit_personalize.sampling.prompt_to_prompt import EditOptions, edit_latents
    from lit_personalize.sampling.sampler import SamplingOptions, start_noise, to_pictures
    from lit_personalize.sampling.words import words_of

    if options.photo and options.seeds:
        raise UsageError("a photo brings its own start noise; leave --seeds out")
    if options.inversion and not options.photo:
        raise UsageError("--inversion says how a photo becomes noise; name one with --photo")
    weights = weights_of(options.weigh)
    edits = options.edits or ([options.source] if weights else [])
    how = EditOptions(options.kind, options.cross_share, options.self_share, options.self_side, weights)
    sampling = SamplingOptions(options.steps, options.guidance, options.negative)
    photo = read_image(options.photo).pixels if options.photo else None
    base = load_base(options.base, config=options.base_config, device=device_of(options.device))
    adapters = []
    for entry in options.adapter:
        path, scale = path_and_scale(entry)
        adapters.append(load_adapter(exports_of(path), base, scale, options.force))
    prompts = [options.source, *edits]
    report: dict[str, Any] = {"pictures": []}
    shown, captions = [], []
    options.output.mkdir(parents=True, exist_ok=True)

    def save(name: str, pixels: Any, prompt: str) -> str:
        Image.fromarray(pixels).save(options.output / f"{name}.png")
        shown.append(pixels)
        captions.append(prompt)
        return str(options.output / f"{name}.png")

    for seed in ["photo"] if photo is not None else options.seeds or [0]:
        unconditional = None
        if photo is not None:
            latent = latent_of(base, photo, options.resolution)
            report["photo"] = save("photo", to_pictures(base, latent)[0], "the photo, as its base stores it")
            null = NullTextOptions() if (options.inversion or "null-text") == "null-text" else None
            null = None if options.inversion is None and options.guidance == 1 else null
            found = invert(base, options.source, latent, adapters, sampling, null, options.refinements)
            start, unconditional = found.path[0], found.unconditional
        else:
            start = start_noise(base, [seed], options.resolution)
        recorder = HeatMaps(len(prompts)) if options.heat_maps is not None else None
        latents = edit_latents(base, options.source, edits, start, adapters, sampling, how, unconditional, recorder)
        if photo is not None:
            report["reconstruction"] = {"latent_rms": float((latents[:1] - latent).square().mean().sqrt())}
        for number, pixels in enumerate(to_pictures(base, latents)):
            drawn = {
                "file": save(f"{number:02d}_{seed}", pixels, prompts[number]),
                "prompt": prompts[number],
                "seed": seed,
            }
            if recorder is not None:
                with base.only(adapters):
                    words = words_of(base, prompts[number])
                place = options.output / f"heat_{number:02d}_{seed}.png"
                maps = recorder.of_words(number, words, options.heat_maps or None)
                save_overlays(place, pixels, words.words, maps, prompts[number])
                drawn["heat_maps"] = str(place)
            report["pictures"].append(drawn)
    columns = len(prompts) + (photo is not None)
    grid = options.output / "grid.png"
    import numpy as np

    captioned_grid(np.stack(shown), captions, columns, max(1, 256 // shown[0].shape[0])).save(grid)
    report["grid"] = str(grid)
    if options.json:
        emit(report, True)
        return 0
    for drawn in report["pictures"]:
        print(drawn["file"], *([drawn["heat_maps"]] if "heat_maps" in drawn else []), sep="\n")
    if photo is not None:
        print(f"reconstruction: rms error of the latent {report['reconstruction']['latent_rms']:.3f}")
    print(grid)
    return 0
