"""`litp bank run`: train the adapters of a job table, many at a time, in as many processes as there are."""

from __future__ import annotations

import argparse
import hashlib
import logging
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_personalize.cli.bank_plan import add_plan, plan, settings_of
from lit_personalize.cli.console import add_device, add_json, configure_logging, emit, task_of
from lit_personalize.errors import DataError, UsageError
from lit_personalize.stop_signals import NOTICES, listen

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from lit_personalize.bank import AdapterJob, Bank
    from lit_personalize.bank.job_table import Row
    from lit_personalize.bank.production import Production, Worker

log = logging.getLogger(__name__)


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the options of `litp bank run`."""
    from lit_personalize.bank.claims import EXPIRY

    parser.add_argument("source", metavar="DIR|PEOPLE", help="folder that litp bank plan made; or what that verb "
                        "takes, with --out, to plan and train at once")  # fmt: skip
    add_plan(parser)
    work = parser.add_argument_group("this process")
    work.add_argument("--slots", type=int, default=8, help="adapters that train at once")
    work.add_argument("--shard", type=task_of, help="I/N: begin with the I-th of N shares of the table, then take what "
                      "others leave; its checkpoints are those of earlier processes of this shard")  # fmt: skip
    work.add_argument("--expiry", type=float, default=EXPIRY, help="seconds after which adapters of a process without "
                      f"a heartbeat are taken over; default: {EXPIRY:g}; the same for all processes")  # fmt: skip
    work.add_argument("--verify", choices=("first", "all", "none"), default="first",
                      help="which adapters to load into the stock client; every file is read back anyway")  # fmt: skip
    add_device(parser)
    add_json(parser)


def main(options: argparse.Namespace, rest: list[str]) -> int:
    configure_logging()
    give_back = listen(*NOTICES, signal.SIGINT)
    try:
        report = run(options, rest)
    finally:
        give_back()
    emit(report if options.json else {k: v for k, v in report.items() if k != "adapters"}, options.json)
    return DataError.exit_code if report["failed"] else 0


def run(options: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """Train what is free; gives the report on the table as it is then.

    Raises:
        UsageError: The configuration.
        RunLockedError: Another process has this shard.
        PreemptedError: A cluster's notice, after saving.
        KeyboardInterrupt: Ctrl-C, after saving.
    """
    from lit_personalize.bank import job_table
    from lit_personalize.bank.claims import JOBS, Ledger, Owner
    from lit_personalize.bank.production import EXPORTS, own_share_first, worker_of
    from lit_personalize.bank.progress import failures

    folder = options.out or Path(options.source)
    if options.out is None and (rest or not (folder / job_table.FILE).is_file()):
        what = f"{rest[0]} is an option of planning" if rest else f"{folder} is no planned bank"
        raise UsageError(f"{what}: give --out DIR to plan, or litp bank plan first")
    if options.out is not None and options.source != str(options.out):
        plan(options, rest)
    config, settings = settings_of(folder)
    rows = job_table.read(folder)
    name = "" if options.shard is None else "{}-of-{}".format(*options.shard)
    worker = worker_of(folder, name)
    with worker, Owner(Ledger(folder / JOBS), worker.name, options.expiry) as owner:
        worker.write_command()
        worker.write_env(str(config.recipe or ""))
        known = owner.seen.done & {row.id for row in rows}
        log.info("%d adapters: %d to train, %d slots", len(rows), len(rows) - len(known), options.slots)
        bank = _bank(options, config, settings)
        made = _production(options, config, settings, bank, own_share_first(rows, options.shard), folder, worker, owner)
        started = time.monotonic()
        made.run()
        seconds = time.monotonic() - started
        seen = owner.refresh()
    done = [row.id for row in rows if row.id in seen.done]
    return {
        "out": str(folder), "worker": worker.name, "done": len(done), "known": len(known),
        "finished here": len(made.finished), "failed": failures(owner.ledger, seen), "steps": bank.steps,
        "seconds": round(seconds, 1), "adapters": {name: str(folder / EXPORTS / name) for name in sorted(done)},
    }  # fmt: skip


def _bank(options: argparse.Namespace, config: Namespace, settings: dict[str, Any]) -> Bank:
    from lit_personalize.bank import Bank
    from lit_personalize.configuration import build_parser
    from lit_personalize.devices import device_of

    model = build_parser().instantiate(_only(config, "model")).model
    return Bank(model, options.slots, config.trainer.gradient_clip_val, settings["init_seed"], settings["patience"],
                device_of(options.device))  # fmt: skip


def _production(
    options: argparse.Namespace, config: Namespace, settings: dict[str, Any], bank: Bank, rows: list[Row],
    folder: Path, worker: Worker, owner: Any,
) -> Production:  # fmt: skip
    from lit_personalize.bank.production import Production
    from lit_personalize.export.verify import verify

    own = {row.id: row for row in rows}

    def check(finished: Any, files: Any, before: int) -> None:
        if options.verify == "all" or (options.verify == "first" and not before):
            concept = concept_of(own[finished.job.id], settings)
            words = f"{concept['token'] or ''} {concept['class_noun']}".strip()
            verify(files, bank.objective.built, finished.weights, str(concept["prompt"]).replace("{}", words))

    return Production(
        bank, rows, folder, worker, owner, lambda row: job_of(row, settings, config, bank, worker),
        config.checkpoint.every, {"recipe": config.recipe}, check,
    )  # fmt: skip


def concept_of(row: Row, settings: dict[str, Any]) -> dict[str, Any]:
    """What the data module is told of a row; its own words before those of all."""
    words = {name: settings[name] if getattr(row, name) is None else getattr(row, name)
             for name in ("class_noun", "token", "prompt")}  # fmt: skip
    return {"path": row.folder, **words}


def job_of(row: Row, settings: dict[str, Any], config: Namespace, bank: Bank, worker: Worker) -> AdapterJob:
    """The adapter of a row; where the row has no seed, it follows from the id and the configured one."""
    from lit_personalize.bank import AdapterJob
    from lit_personalize.cli.bank_people import member_writer
    from lit_personalize.configuration import data_of
    from lit_personalize.fitting import bind_encoders

    concept = concept_of(row, settings)
    seed = row.seed
    if seed is None:
        digest = hashlib.blake2b(f"{config.model.init_args.seed}|{row.id}".encode(), digest_size=4).digest()
        seed = int.from_bytes(digest, "little") >> 1

    def load() -> Any:
        if not row.folder:
            place = worker.pictures / row.id
            place.mkdir(parents=True, exist_ok=True)
            member_writer(row)(place)
            concept["path"] = str(place)
        data = data_of(config, [concept], seed)
        bind_encoders(data, bank.objective.built, config.sampling)
        data.prepare_data()
        data.setup("fit")
        return data

    steps = config.trainer.max_steps if row.steps is None else row.steps
    return AdapterJob(row.id, load, steps, seed, concept["class_noun"], row.lr, row.weight_decay, row.clip)


def _only(config: Namespace, key: str) -> Namespace:
    from jsonargparse import Namespace

    return Namespace(**{key: config.clone()[key]})
