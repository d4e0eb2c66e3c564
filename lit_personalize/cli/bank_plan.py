"""`litp bank plan`: a job table of adapters, and the configuration that trains all of them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_personalize.errors import DataError, UsageError

if TYPE_CHECKING:
    from jsonargparse import Namespace

REFUSED = {
    "ema": "moving average",
    "checkpoint.best": "best checkpoint",
    "trainer.accumulate_grad_batches": "accumulation of gradients",
}
FURTHER = "Further options are those of litp fit, such as --trainer.max_steps 400 and --model.init_args.base DIR."
SETTINGS = ("class_noun", "token", "prompt", "init_seed", "patience")
CONFIG, RECORD, LEFT_OUT = "config.yaml", "bank.json", "left_out.txt"


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Add the options that decide adapters."""
    group = parser.add_argument_group("the plan")
    group.add_argument("--out", type=Path, help="folder for table, exports/NAME/, records and checkpoints")
    group.add_argument("-c", "--config", action="append", help="YAML file or recipe of litp fit; may be repeated; "
                       "default: lora/tinyworld")  # fmt: skip
    group.add_argument("--class-noun", default="", help='what the pictures show: "person"')
    group.add_argument("--token", default=None, help="modifier token, where the recipe trains one")
    group.add_argument("--prompt", default="photo of a {}", help="caption of pictures without .txt; {} is token and "
                       "noun")  # fmt: skip
    group.add_argument("--init-seed", type=int, default=0, help="of the initial LoRA factors, one for all adapters")
    group.add_argument("--patience", type=int, default=5, help="steps in a row that may be left out as not finite")
    group.add_argument("--tolerate", type=int, default=0, metavar="N", help="adapters that may be left out because "
                       "their pictures are missing or their line is damaged")  # fmt: skip


def plan(options: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Write the job table and what decides its adapters; the same command again changes nothing.

    Raises:
        UsageError: The configuration; or the folder was planned with another one, or with other adapters.
        DataError: Adapters that cannot be trained; names them.
    """
    from lit_personalize.bank import job_table
    from lit_personalize.cli.bank_people import rows_of
    from lit_personalize.configuration import resolved_text
    from lit_personalize.run_directory import RunDirectory

    if options.out is None:
        raise UsageError("--out DIR is missing: the folder for table, exports and records")
    found = rows_of(options.source, options.tolerate)
    parser, config = configuration(options, rest)
    directory = RunDirectory(options.out.parent, options.out.name)
    resolved = resolved_text(parser, config)
    given = {"config": resolved, "recipe": str(config.recipe or "")}
    own = json.dumps(given | {name: getattr(options, name) for name in SETTINGS}, indent=1)
    record = directory.path / RECORD
    if record.exists() and record.read_text(encoding="utf-8") != own:
        raise UsageError(f"{directory.path} was begun with other options, see {RECORD} in it: use another --out")
    new = job_table.write(directory.path, found.rows)
    if new or not record.exists():
        directory.write_text(CONFIG, resolved)
        directory.write_text(RECORD, own)
    if found.left_out:
        directory.write_text(LEFT_OUT, "\n".join(found.left_out) + "\n")
    return {"out": str(directory.path), "adapters": len(found.rows), "new": new, "left out": found.left_out}


def configuration(options: argparse.Namespace, rest: list[str]) -> tuple[Any, Namespace]:
    """The parsed configuration; its concepts are not those of any adapter.

    Raises:
        UsageError: It asks for what a bank does not do.
    """
    from lit_personalize.configuration import parse

    given = [part for name in options.config or ["lora/tinyworld"] for part in ("-c", name)]
    parser, config = parse([*given, "--name", options.out.name, "--root", str(options.out.parent), *rest])
    for key, what in REFUSED.items():
        if config.get(key) not in (None, False, 1):
            raise UsageError(f"{key} is set, and a bank has no {what}: leave it out, or use litp fit")
    if config.data.init_args.concepts:
        raise UsageError("data.concepts is set, and a bank has one concept for each adapter: leave it out")
    return parser, config


def settings_of(folder: Path) -> tuple[Namespace, dict[str, Any]]:
    """The configuration of a planned bank, and what it says of all adapters.

    Raises:
        DataError: The record is missing or damaged.
    """
    from lit_personalize.configuration import parse

    try:
        settings = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        resolved, recipe = settings["config"], settings.get("recipe", "")
        settings = {name: settings[name] for name in SETTINGS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / RECORD} cannot be read ({error}): plan the bank again") from error
    path = folder / CONFIG
    if not path.is_file() or path.read_text(encoding="utf-8") != resolved:
        raise DataError(f"{path} is not what the bank was planned with: take it from {RECORD}, or use another folder")
    return parse(["-c", str(path), *(["--recipe", recipe] if recipe else [])])[1], settings
