"""What verbs share in talking to people: logs on stderr, results on stdout."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lit_personalize.ranks import is_rank_zero

if TYPE_CHECKING:
    from lit_personalize.backbones.base import Base

PLACES = {
    "README.md": "model card with sample pictures",
    "exports": "adapter files and what verification found",
    "samples/grid.png": "prompts by training step",
    "sheet.png": "crops and captions that the model saw",
    "manifest.jsonl": "the fate of every input file",
    "config.yaml": "the resolved configuration",
    "metrics.csv": "loss and speed by step",
    "checkpoints": "resumable states",
}
ALLOW_HELP = (
    "package, module or class of your own that configurations may name, such as my_package: it is imported, which runs "
    "its code. `pipe` lets them run commands as shards. May be repeated; LITP_ALLOW=A,B in the environment does it, too"
)
JSON_HELP = "print the result as one JSON object, and nothing else, to stdout; messages go to stderr"


def configure_logging() -> None:
    """Send our messages to stderr, one line each and of rank 0 alone; keep libraries to warnings."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    for name in ("lit_personalize", "lit_callbacks", "lit_datamodules"):
        logging.getLogger(name).setLevel(logging.INFO if is_rank_zero() else logging.WARNING)
    for name in ("diffusers", "transformers", "torch.distributed", "lightning", "deepspeed", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option --device, which `lit_personalize.devices.device_of` reads."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")


def add_base(parser: argparse.ArgumentParser) -> None:
    """Add the options of the base, --base, --base-config and --device, which `base_of` reads."""
    parser.add_argument("--base", default="tinyworld", help='diffusers directory, single file, or "tinyworld"')
    parser.add_argument("--base-config", default=None, help="configs and tokenizers of a single-file base")
    add_device(parser)


def base_of(options: argparse.Namespace) -> Base:
    """Load the base that the options name.

    Raises:
        DataError: It is missing or damaged.
        UsageError: The device is not there.
    """
    from lit_personalize.backbones.loading import load_base
    from lit_personalize.devices import device_of

    return load_base(options.base, config=options.base_config, device=device_of(options.device))


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option --json of verbs that report."""
    parser.add_argument("--json", action="store_true", help=JSON_HELP)


def add_allow(parser: argparse.ArgumentParser) -> None:
    """Add the option --allow of verbs that read a configuration; `allowed_by` gives it on."""
    parser.add_argument("--allow", action="append", default=[], metavar="NAME", help=ALLOW_HELP)


def allowed_by(options: argparse.Namespace) -> list[str]:
    """The option --allow as `configuration.parse` takes it."""
    return [f"--allow={name}" for name in options.allow]


def task_of(text: str) -> tuple[int, int]:
    """Read "I/N", one of N shares of a piece of work; for argparse.

    Raises:
        argparse.ArgumentTypeError: It is something else, or there is no such share.
    """
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no I/N with I from 0 to N-1, such as 3/16")
    return int(number), int(count)


def where_things_are(folder: Path, stream: TextIO) -> None:
    """A table of the run's files that exist."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"run {folder}", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for place, text in PLACES.items():
        if (folder / place).exists():
            table.add_row(str(folder / place), text)
    Console(file=stream).print(table)


def report_run(folder: Path, as_json: bool) -> None:
    """Print where a run's files are; as JSON also its newest whole checkpoint and its exports."""
    if not as_json:
        where_things_are(folder, sys.stdout)
        return
    emit(run_report(folder), True)


def run_report(folder: Path) -> dict[str, Any]:
    """Directory, newest whole checkpoint's step (0 if there is none), exports and other files of a run."""
    from lit_personalize.checkpoints import find_complete
    from lit_personalize.run_state import EXPORTS

    found = find_complete(folder / "checkpoints")
    exports = [path for pattern in EXPORTS for path in sorted((folder / "exports").glob(pattern))]
    return {
        "run": str(folder),
        "step": found.step if found else 0,
        "exports": [str(path) for path in exports],
        "files": {place: str(folder / place) for place in PLACES if (folder / place).exists()},
    }


def emit(value: dict[str, Any], as_json: bool) -> None:
    """Print a flat report: JSON, or one `key  value` line each."""
    if as_json:
        print(json.dumps(value, indent=2))
        return
    width = max(map(len, value), default=0)
    for key, item in value.items():
        print(f"{key:<{width}}  {item}")
