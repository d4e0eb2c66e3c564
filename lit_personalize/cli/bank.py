"""`litp bank run`: one adapter for every folder of pictures, many at a time."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_personalize.cli import bank_store
from lit_personalize.cli.console import add_device, add_json, configure_logging, emit
from lit_personalize.errors import DataError, PreemptedError, UsageError
from lit_personalize.stop_signals import NOTICES, listen, noted

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from lit_personalize.bank import AdapterJob, Bank
    from lit_personalize.run_directory import RunDirectory

log = logging.getLogger(__name__)
REFUSED = {
    "ema": "moving average",
    "checkpoint.best": "best checkpoint",
    "trainer.accumulate_grad_batches": "accumulation of gradients",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="litp bank", description="Train many adapters in one batched pass, each as if it were alone.",
        epilog="Further options are those of litp fit, such as --trainer.max_steps 400 and --model.init_args.base DIR.",
    )  # fmt: skip
    verbs = parser.add_subparsers(dest="what", required=True, metavar="run|pack|get")
    run = verbs.add_parser("run", help="train one adapter for each folder; the same command continues",
                           epilog=parser.epilog)  # fmt: skip
    run.add_argument("people", type=Path, help="folder of folders of pictures: the name of each names its adapter")
    run.add_argument("--out", type=Path, required=True, help="folder for exports/NAME/, record and checkpoints")
    run.add_argument("-c", "--config", action="append", help="YAML file or recipe of litp fit; may be repeated; "
                     "default: lora/tinyworld")  # fmt: skip
    run.add_argument("--slots", type=int, default=8, help="adapters that train at once")
    run.add_argument("--class-noun", default="", help='what the folders show: "person"')
    run.add_argument("--token", default=None, help="modifier token, where the recipe trains one")
    run.add_argument("--prompt", default="photo of a {}", help="caption of pictures without .txt; {} is token and noun")
    run.add_argument("--init-seed", type=int, default=0, help="of the initial LoRA factors, one for all adapters")
    run.add_argument("--patience", type=int, default=5, help="steps in a row that may be left out as not finite")
    run.add_argument("--verify", choices=("first", "all", "none"), default="first",
                     help="which adapters to load into the stock client; every file is read back anyway")  # fmt: skip
    add_device(run)
    add_json(run)
    bank_store.add_verbs(verbs)
    return parser


def main(arguments: list[str]) -> int:
    options, rest = build_parser().parse_known_args(arguments)
    if options.what in ("pack", "get"):
        return bank_store.main(build_parser().parse_args(arguments))  # which refuses what is left over
    configure_logging()
    give_back = listen(*NOTICES, signal.SIGINT)
    try:
        report = run(options, rest)
    finally:
        give_back()
    emit(report if options.json else {k: v for k, v in report.items() if k != "adapters"}, options.json)
    return DataError.exit_code if report["failed"] else 0


def run(options: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Train what is not exported yet; gives the report.

    Raises:
        UsageError: The configuration, or another owner of the folder.
        PreemptedError: A cluster's notice, after saving.
        KeyboardInterrupt: Ctrl-C, after saving.
    """
    from lit_personalize.bank import Bank, checkpoint
    from lit_personalize.bank.export import is_exported, write
    from lit_personalize.configuration import resolved_text
    from lit_personalize.devices import device_of
    from lit_personalize.export.verify import verify
    from lit_personalize.run_directory import RunDirectory

    folders = people_in(options.people)
    parser, config = configuration(options, rest)
    directory = RunDirectory(options.out.parent, options.out.name).create()
    adapters = directory.exports
    with directory.lock():
        record(directory, resolved_text(parser, config), options)
        bank = Bank(
            parser.instantiate(_only(config, "model")).model, options.slots, config.trainer.gradient_clip_val,
            options.init_seed, options.patience, device_of(options.device),
        )  # fmt: skip
        begun = checkpoint.restore(bank, directory.checkpoints)
        known = [folder.name for folder in folders if is_exported(adapters, folder.name) and folder.name not in begun]
        jobs = [job_of(folder, options, config, bank) for folder in folders if folder.name not in known]
        log.info("%d adapters: %d to train, %d slots", len(folders), len(jobs), options.slots)
        stop = _Stop(directory, config.checkpoint.every)
        started, done, failed = time.monotonic(), list(known), {}
        for finished in bank.run(jobs, stop):
            name = finished.job.id
            if finished.failure:
                failed[name] = finished.failure
                log.warning("%s failed: %s", name, finished.failure)
                continue
            files = write(finished, adapters, bank, details={"recipe": config.recipe})
            if options.verify == "all" or (options.verify == "first" and done == known):
                prompt = options.prompt.replace("{}", f"{options.token or ''} {options.class_noun}".strip())
                verify(files, bank.objective.built, finished.weights, prompt)
            done.append(name)
            log.info("%s: %d steps, loss %.4f (%d of %d)", name, finished.job.steps, finished.losses[-1], len(done),
                     len(folders))  # fmt: skip
        seconds = time.monotonic() - started
    return {
        "out": str(directory.path), "done": len(done), "known": len(known), "failed": failed, "steps": bank.steps,
        "seconds": round(seconds, 1), "adapters": {name: str(adapters / name) for name in sorted(done)},
    }  # fmt: skip


class _Stop:
    """Between steps: save now and then, and at a signal save and end."""

    def __init__(self, directory: RunDirectory, every: int):
        self.directory, self.every = directory, every

    def __call__(self, bank: Bank) -> None:
        from lit_personalize.bank import checkpoint

        stopping = noted.notice is not None or noted.interrupt
        if stopping or bank.steps % self.every == 0:
            checkpoint.save(bank, self.directory.checkpoints)
        if stopping:
            name, interrupted = noted.notice.name if noted.notice else "", noted.interrupt
            noted.clear()
            if interrupted:
                raise KeyboardInterrupt(f"saved at step {bank.steps}; the same command continues")
            self.directory.note_preemption(f"{name} step={bank.steps}")
            raise PreemptedError(f"{name}: saved at step {bank.steps}; the same command continues")


def people_in(folder: Path) -> list[Path]:
    """The folders in a folder, by name.

    Raises:
        DataError: There are none.
    """
    found = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")) if folder.is_dir() else []
    if not found:
        raise DataError(f"{folder} holds no folder of pictures: litp bank run takes a folder with one for each adapter")
    return found


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
        raise UsageError("data.concepts is set, and a bank has one concept for each folder: leave it out")
    return parser, config


def job_of(folder: Path, options: argparse.Namespace, config: Namespace, bank: Bank) -> AdapterJob:
    """The adapter of a folder; its seed follows from its name and the configured one."""
    from lit_personalize.bank import AdapterJob
    from lit_personalize.configuration import data_of
    from lit_personalize.fitting import bind_encoders

    digest = hashlib.blake2b(f"{config.model.init_args.seed}|{folder.name}".encode(), digest_size=4).digest()
    seed = int.from_bytes(digest, "little") >> 1
    concept = {"path": str(folder), "class_noun": options.class_noun, "token": options.token, "prompt": options.prompt}

    def load() -> Any:
        data = data_of(config, [concept], seed)
        bind_encoders(data, bank.objective.built, config.sampling)
        data.prepare_data()
        data.setup("fit")
        return data

    return AdapterJob(folder.name, load, config.trainer.max_steps, seed, options.class_noun)


def record(directory: RunDirectory, resolved: str, options: argparse.Namespace) -> None:
    """Note what decides the adapters, once.

    Raises:
        UsageError: The folder holds adapters of another configuration.
    """
    names = ("class_noun", "token", "prompt", "init_seed", "patience")
    own = json.dumps({"config": resolved, **{name: getattr(options, name) for name in names}}, indent=1)
    path = directory.path / "bank.json"
    if path.exists() and path.read_text(encoding="utf-8") != own:
        raise UsageError(f"{directory.path} was begun with other options, see bank.json in it: use another --out")
    directory.write_text("bank.json", own)
    directory.write_record(resolved)


def _only(config: Namespace, key: str) -> Namespace:
    from jsonargparse import Namespace

    return Namespace(**{key: config.clone()[key]})
