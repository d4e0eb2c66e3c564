"""`litp w2w invert`: the adapter in a space that shows the subject of one or a few pictures; a run of `litp fit`."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from lit_personalize.cli.console import ALLOW_HELP, add_json, configure_logging, emit, run_report
from lit_personalize.errors import DataError, UsageError

METHOD = "weights2weights_inversion"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="litp w2w invert",
        description="Find the adapter in the space that shows the subject of a picture: its coefficients train, from "
        "the mean adapter on. The result is a run: the same command continues.",
        epilog="Further options are those of litp fit, such as --model.init_args.dtype float16.",
    )
    parser.add_argument("space", type=Path, metavar="SPACE", help="folder of litp w2w fit")
    parser.add_argument("pictures", type=Path, nargs="+", metavar="PICTURE", help="of one subject")
    parser.add_argument("--prompt", required=True, help='their caption, as the corpus had it: "sks person"')
    parser.add_argument("--mask", type=Path, nargs="+", help="for each picture one, white where the loss counts")
    parser.add_argument("--components", type=int, help="that train; default: 10000, or as many as there are; of "
                        "pictures unlike the corpus 1000, with --lr 1 --weight-decay 0 --steps 800")  # fmt: skip
    parser.add_argument("--steps", type=int, help="default: the recipe's, 400")
    parser.add_argument("--lr", type=float, help="default: the recipe's, 0.1")
    parser.add_argument("--weight-decay", type=float, help="default: the recipe's, 1e-10")
    parser.add_argument("--base", help="what the adapters were trained on; default: what the space names")
    parser.add_argument("-c", "--config", help=f"recipe or file; default: {METHOD}/ of the base's family")
    parser.add_argument("--name", default=None, help="of the run; default: inverted-PICTURE")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder of run directories")
    parser.add_argument("--allow", action="append", default=[], metavar="NAME", help=ALLOW_HELP)
    add_json(parser)
    return parser


def main(arguments: list[str]) -> int:
    options, rest = build_parser().parse_known_args(arguments)
    configure_logging()
    from lit_personalize.fitting import fit
    from lit_personalize.ranks import is_rank_zero

    name = options.name or f"inverted-{options.pictures[0].stem}"
    config = prepare(options, options.root / name)
    extra = [f"--allow={entry}" for entry in options.allow]
    chosen = [("--trainer.max_steps", options.steps)]
    for key in ("lr", "weight_decay"):
        chosen.append((f"--model.init_args.optimizer.init_args.{key}", getattr(options, key)))
    extra += [f"{key}={value}" for key, value in chosen if value is not None]
    run = fit(["-c", recipe_of(options), "-c", str(config), "--name", name, "--root", str(options.root), *extra, *rest])
    if is_rank_zero():
        note_coefficients(run.path)
        report = {**run_report(run.path), "coefficients": str(run.path / "exports" / "w2w.json")}
        emit(report if options.json else {k: v for k, v in report.items() if k != "files"}, options.json)
    return 0


def recipe_of(options: argparse.Namespace) -> str:
    """The recipe that is named, or that of the base's family."""
    from lit_personalize.recipe_files import RECIPES, base_key

    if options.config:
        return str(options.config)
    key = base_key(base_of(options))
    return f"{METHOD}/{key if (RECIPES / METHOD / f'{key}.yaml').is_file() else 'sd15'}"


def base_of(options: argparse.Namespace) -> str:
    """Where the base is.

    Raises:
        DataError: There is no space.
        UsageError: No base is known.
    """
    from lit_personalize.weights2weights.subspace import RECORD

    if options.base:
        return str(options.base)
    record = options.space / RECORD
    if not record.is_file():
        raise DataError(f"{options.space} holds no subspace of a corpus ({RECORD}): make one with litp w2w fit")
    named = json.loads(record.read_text(encoding="utf-8")).get("base")
    if not named:
        raise UsageError("name what the adapters were trained on: --base DIR")
    return str(named)


def prepare(options: argparse.Namespace, folder: Path) -> Path:
    """Copy pictures and masks into the run, and write the part of its configuration that names them.

    Raises:
        DataError: A file is missing.
        UsageError: There are not as many masks as pictures.
    """
    import yaml

    masks = options.mask or []
    if masks and len(masks) != len(options.pictures):
        raise UsageError(f"{len(options.pictures)} pictures and {len(masks)} masks: give one for each, in their order")
    if missing := [path for path in (*options.pictures, *masks) if not path.is_file()]:
        raise DataError(f"picture {missing[0]} does not exist")
    if not options.space.is_dir():
        raise DataError(f"{options.space} holds no subspace of a corpus: make one with litp w2w fit")
    concept: dict[str, Any] = {"path": str(folder / "pictures"), "prompt": options.prompt, "captions": "prompt"}
    _copy(options.pictures, folder / "pictures")
    if masks:
        _copy(masks, folder / "masks")
        concept["masks"] = str(folder / "masks")
    adapter = {"space": str(options.space), "components": options.components}
    told = {
        "model": {"init_args": {
            "base": base_of(options), "adapters": [{"class_path": "SubspaceLoRA", "init_args": adapter}],
        }},
        "data": {"init_args": {"concepts": [concept]}},
        "sampling": {"prompts": [options.prompt]},
    }  # fmt: skip
    config = folder / "inversion.yaml"
    config.write_text(yaml.safe_dump(told, sort_keys=False), encoding="utf-8")
    return config


def _copy(paths: list[Path], folder: Path) -> None:
    """One file for each, by number: two pictures of different folders may have one name."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = [folder / f"{number:03d}{path.suffix.lower()}" for number, path in enumerate(paths)]
    for old in folder.iterdir():
        if old not in kept:
            old.unlink()
    for path, place in zip(paths, kept, strict=True):
        shutil.copyfile(path, place)


def note_coefficients(run: Path) -> None:
    """Write what the run found into `exports/w2w.json`."""
    from lit_personalize import atomic, checkpoints
    from lit_personalize.adapters.subspace_lora import BETA
    from lit_personalize.weights2weights.writing import RECORD

    found = checkpoints.find_complete(run / "checkpoints")
    if found is None:
        raise DataError(f"{run} has no complete checkpoint: the same command continues it")
    (beta,) = (v for k, v in checkpoints.load_state(found.path).items() if k.endswith(f".{BETA}"))
    told = {"w2w": "invert", "steps": found.step, "coefficients": beta.tolist()}
    atomic.write_text(run / "exports" / RECORD, json.dumps(told) + "\n")
