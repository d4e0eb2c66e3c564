"""`litp edit`: change the words of a prompt and keep the picture, drawn or photographed; show where words act."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_personalize.cli.console import add_base, add_json, base_of, configure_logging, emit

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from lit_personalize.adapters.protocol import Adapter
    from lit_personalize.backbones.base import Base
    from lit_personalize.sampling.prompt_to_prompt import EditOptions
    from lit_personalize.sampling.sampler import SamplingOptions


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
    parser.add_argument("--blend", default="", metavar="WORD[,WORD]",
                        help="change the picture only where these words of source or edit act")  # fmt: skip
    parser.add_argument("--heat-maps", type=int, nargs="?", const=0, default=None, metavar="SIDE",
                        help="also draw where each word acts, by layers of SIDE cells or by all")  # fmt: skip
    parser.add_argument("--inversion", choices=("null-text", "ddim"), default=None,
                        help="of the photo; null-text unless guidance is 1")  # fmt: skip
    parser.add_argument("--refinements", type=int, default=0, help="fixed-point iterations of each inversion step")
    add_base(parser)
    parser.add_argument("--adapter", action="append", default=[], metavar="FILE|FOLDER[@SCALE]", help="may be repeated")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="of drawn pictures; 0 if left out")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=6.0)
    parser.add_argument("--negative", default="")
    parser.add_argument("--resolution", type=int, default=None)
    parser.add_argument("--force", action="store_true", help="accept an adapter that was made for another base")
    parser.add_argument("-o", "--output", type=Path, default=Path("edits"), help="folder for pictures and grid.png")
    add_json(parser)
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


@dataclass(frozen=True)
class Task:
    """A prompt, its edits, and how they are drawn."""

    base: Base
    adapters: list[Adapter]
    source: str
    edits: list[str]
    sampling: SamplingOptions
    how: EditOptions
    resolution: int | None
    heat_side: int | None
    """Of the layers whose heat maps are drawn; 0 for all layers, None for no heat maps."""


def draw(task: Task, name: str, folder: Path, start: Tensor, unconditional: Tensor | None = None) -> list[Any]:
    """Draw source and edits from one start, write their files into `folder`, and return (pixels, report) of each."""
    from PIL import Image

    from lit_personalize.sampling.heat_maps import HeatMaps, save_overlays
    from lit_personalize.sampling.prompt_to_prompt import edit_latents
    from lit_personalize.sampling.sampler import to_pictures
    from lit_personalize.sampling.words import words_of

    prompts = [task.source, *task.edits]
    recorder = None if task.heat_side is None else HeatMaps(len(prompts))
    latents = edit_latents(
        task.base, task.source, task.edits, start, task.adapters, task.sampling, task.how, unconditional, recorder
    )
    drawn = []
    for number, pixels in enumerate(to_pictures(task.base, latents)):
        report: dict[str, Any] = {"file": str(folder / f"{number:02d}_{name}.png"), "prompt": prompts[number]}
        Image.fromarray(pixels).save(report["file"])
        if number and task.how.weights:
            report["weights"] = dict(task.how.weights)
        if recorder is not None:
            words, place = words_of(task.base, prompts[number]), folder / f"heat_{number:02d}_{name}.png"
            maps = recorder.of_words(number, words, task.heat_side or None)
            save_overlays(place, pixels, words.words, maps, prompts[number])
            report["heat_maps"] = str(place)
        drawn.append((pixels, report, latents[number : number + 1]))
    return drawn


def edit_photo(task: Task, photo: np.ndarray, folder: Path, inversion: str | None, refinements: int) -> list[Any]:
    """Like `draw`, from a photo's inverted latent; the photo as the base's VAE stores it comes first."""
    from PIL import Image

    from lit_personalize.sampling.inversion import NullTextOptions, invert, latent_of
    from lit_personalize.sampling.sampler import to_pictures

    latent = latent_of(task.base, photo, task.resolution)
    stored = to_pictures(task.base, latent)[0]
    Image.fromarray(stored).save(folder / "photo.png")
    learns = inversion == "null-text" or (inversion is None and task.sampling.guidance != 1)
    null_text = NullTextOptions() if learns else None
    found = invert(task.base, task.source, latent, task.adapters, task.sampling, null_text, refinements)
    drawn = draw(task, "photo", folder, found.path[0], found.unconditional)
    drawn[0][1]["latent_rms"] = float((drawn[0][2] - latent).square().mean().sqrt())
    return [(stored, {"file": str(folder / "photo.png"), "prompt": "the photo, as the VAE stores it"}, latent), *drawn]


def caption_of(report: dict[str, Any]) -> str:
    weights = ", ".join(f"{word}={factor:g}" for word, factor in report.get("weights", {}).items())
    return f"{report['prompt']} ({weights})" if weights else str(report["prompt"])


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    configure_logging()
    import numpy as np

    from lit_datamodules.image_files import read_image
    from lit_personalize.errors import UsageError
    from lit_personalize.sampling.cells import source_of
    from lit_personalize.sampling.grid import captioned_grid
    from lit_personalize.sampling.prompt_to_prompt import EditOptions
    from lit_personalize.sampling.sampler import SamplingOptions, start_noise

    if options.photo and options.seeds:
        raise UsageError("a photo brings its own start noise; leave --seeds out")
    if not options.photo and (options.inversion or options.refinements):
        raise UsageError("--inversion and --refinements say how a photo becomes noise; name one with --photo")
    weights = weights_of(options.weigh)
    edits = options.edits or ([options.source] if weights else [])
    blend = [word for word in options.blend.split(",") if word]
    if blend and not edits:
        raise UsageError("--blend says where an edit may change the picture; name an edit, or --weigh a word")
    how = EditOptions(options.kind, options.cross_share, options.self_share, options.self_side, weights, blend)
    sampling = SamplingOptions(options.steps, options.guidance, options.negative)
    photo = read_image(options.photo).pixels if options.photo else None
    base = base_of(options)
    adapters: list[Adapter] = [source_of(entry, options.force).attach(base) for entry in options.adapter]
    task = Task(base, adapters, options.source, edits, sampling, how, options.resolution, options.heat_maps)
    options.output.mkdir(parents=True, exist_ok=True)
    if photo is not None:
        drawn = edit_photo(task, photo, options.output, options.inversion, options.refinements)
        columns = len(drawn)
    else:
        drawn, columns = [], 1 + len(edits)
        for seed in options.seeds or [0]:
            drawn += draw(task, str(seed), options.output, start_noise(base, [seed], options.resolution))
    shown, reports = np.stack([pixels for pixels, *_ in drawn]), [report for _, report, _ in drawn]
    grid = options.output / "grid.png"
    captioned_grid(shown, list(map(caption_of, reports)), columns, max(1, 256 // shown.shape[1])).save(grid)
    if options.json:
        emit({"pictures": reports, "grid": str(grid)}, True)
        return 0
    for report in reports:
        print(report["file"], *([report["heat_maps"]] if "heat_maps" in report else []), sep="\n")
        if "latent_rms" in report:
            print(f"  rms error of the latent {report['latent_rms']:.3f}")
    print(grid)
    return 0
